"""What cannot be loaded is refused with the tensor or field and what is accepted. Nothing else comes out, no code runs.

The last part feeds random headers, indices and configs: whatever is not a sound checkpoint must end in a ModelError.
"""

import copy
import json
import pickle
import re
import resource
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import Quantized, make_checkpoint, update_json
from support.small_tokenizers import byte_level_tokenizer_json, write_tokenizer

from nybble.build import build
from nybble.core.config import EngineConfig
from nybble.core.errors import ModelError, UnsupportedError
from nybble.models.checkpoint import INDEX, Checkpoint
from nybble.models.decoder import CausalLM
from nybble.models.load import load_model
from nybble.models.safetensors_file import SafetensorsFile

FILE = "model.safetensors"
NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj"
SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 96}
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory of each kind, made once; tests work on copies."""
    root = tmp_path_factory.mktemp("sound")
    make_checkpoint(root / "dense", "llama", **SIZES)
    make_checkpoint(root / "sharded", "llama", num_shards=2, **SIZES)
    make_checkpoint(root / "awq", "llama", quantized=Quantized(method="awq", group_size=32), **SIZES)
    make_checkpoint(root / "gptq", "llama", quantized=Quantized(method="gptq", group_size=32), **SIZES)
    for path in root.iterdir():
        write_tokenizer(path, byte_level_tokenizer_json())
    return root.joinpath


@pytest.fixture
def copy_of(sound: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(sound(kind), tmp_path / kind)


@pytest.fixture
def path(copy_of: Callable[[str], Path]) -> Path:
    return copy_of("dense")


def load(path: Path) -> CausalLM:
    return load_model(Checkpoint.open(path), dtype=torch.float32, device=torch.device("cpu"))


def start(path: Path) -> None:
    """All of it, tokenizer and engine included."""
    build(EngineConfig(model=str(path), device="cpu", dtype="float32", kv_cache_memory_bytes=1 << 20)).engine.close()


def change_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; a name's dots are written as two underscores."""
    tensors: dict[str, torch.Tensor | None] = load_file(path / FILE) | {
        name.replace("__", "."): tensor for name, tensor in changes.items()
    }
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / FILE)


@pytest.mark.parametrize("kind", ["dense", "sharded", "awq", "gptq"])
def test_what_the_tests_break_is_sound(sound: Callable[[str], Path], kind: str) -> None:
    start(sound(kind))


# Pickles and remote code


class Evil:
    """Its pickle touches a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_refused_and_not_opened(path: Path, name: str) -> None:
    marker = path / "opened"
    (path / FILE).unlink()
    (path / name).write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(UnsupportedError, match=rf"pickled weights only \({name}\).*never opened.*safetensors"):
        start(path)
    assert not marker.exists()
    pickle.loads((path / name).read_bytes())
    assert marker.exists(), "the trap works"


def test_a_pickle_with_a_safetensors_name_is_refused(path: Path) -> None:
    (path / FILE).write_bytes(pickle.dumps(Evil(path / "opened")))
    with pytest.raises(ModelError, match=rf"{FILE}: truncated or not safetensors"):
        start(path)
    assert not (path / "opened").exists()


def plant_code(path: Path) -> Path:
    """Code beside the checkpoint that its JSON files ask to run; the file it would leave behind."""
    marker = path / "ran"
    (path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    update_json(path / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    update_json(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    return marker


def test_code_beside_a_known_architecture_is_ignored(path: Path) -> None:
    marker = plant_code(path)
    start(path)
    assert not marker.exists()


def test_an_architecture_that_is_code_is_refused(path: Path) -> None:
    marker = plant_code(path)
    update_json(path / "config.json", model_type="evil", architectures=["EvilForCausalLM"])
    with pytest.raises(UnsupportedError, match=r"'evil'.*EvilForCausalLM.*never runs remote code; accepted are Qwen2"):
        start(path)
    assert not marker.exists()


def test_a_tokenizer_that_is_code_is_refused(path: Path) -> None:
    marker = plant_code(path)
    (path / "tokenizer.json").rename(path / "vocab.json")  # an old kind, which transformers is asked to convert
    update_json(path / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    with pytest.raises(ModelError, match=r"no tokenizer\.json.*vocab\.json could not be converted"):
        start(path)
    assert not marker.exists()


# Files


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        start(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file; give the model's directory"):
        start(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"has no config\.json"),
        ("config.json", b"{", r"config\.json is not valid JSON"),
        ("config.json", b"\xff\xfe\xfd", r"config\.json is not valid JSON"),
        ("config.json", b"[" * 100_000, r"config\.json is not valid JSON"),
        ("config.json", b"[]", r"config\.json must hold a JSON object"),
        ("generation_config.json", b"3", r"generation_config\.json must hold a JSON object"),
        ("tokenizer.json", None, r"no tokenizer in .*: looked for tokenizer\.json"),
        ("tokenizer.json", b"{}", r"tokenizer\.json is damaged"),
        (FILE, None, r"no \.safetensors file"),
    ],
)
def test_missing_and_damaged_files(path: Path, file: str, content: bytes | None, message: str) -> None:
    (path / file).unlink(missing_ok=True)
    if content is not None:
        (path / file).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        start(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, r"'mamba'.*accepted are Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"LlamaForSequenceClassification.*accepted are"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures must be a list of names"),
        ({"model_type": None, "architectures": None}, r"model_type None"),
        ({"hidden_size": None}, r"hidden_size must be a positive integer below 2³¹, got None"),
        ({"hidden_size": "64"}, r"hidden_size must be a positive integer.*'64'"),
        ({"vocab_size": 2**31}, r"vocab_size must be a positive integer below 2³¹"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers = 1000000; at most 4096"),
        ({"num_key_value_heads": 3}, r"num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 17}, r"head_dim = 17 must be even"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps must be a positive number, got -1"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps must be a positive number"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; 'silu' is accepted"),
        ({"dtype": "int8"}, r"dtype 'int8' is not supported; accepted are float16"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"rope type 'longrope' is not supported; accepted are default"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor must be a positive number, got None"),
        ({"rope_scaling": "yarn"}, r"rope_scaling must be an object, got 'yarn'"),
        ({"max_position_embeddings": 2**31 - 1}, r"rotary table of .* GB; set max_model_len"),
        ({"eos_token_id": "</s>"}, r"eos_token_id must be an id or a list of ids"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quant_method is 'fp8'; accepted are dense weights, AWQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, r"quantization_config\.bits is 8; 4 is accepted"),
        ({"quantization_config": {"quant_method": "gptq", "desc_act": True}}, r"desc_act is true"),
    ],
)
def test_config_fields(path: Path, fields: dict[str, Any], message: str) -> None:
    (path / "generation_config.json").unlink(missing_ok=True)
    update_json(path / "config.json", **fields)
    with pytest.raises(ModelError, match=message):
        start(path)


# Tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"lacks model\.norm\.weight, .*: \[64\] float16/bfloat16/float32"),
        ({"lm_head__weight": None}, r"lacks lm_head\.weight, .*: \[96, 64\]"),
        ({"model__layers__0__self_attn__k_proj__weight": None}, r"lacks model\.layers\.0\.self_attn\.k_proj\.weight"),
        (
            {"model__layers__0__self_attn__q_norm__weight": torch.ones(16)},
            r"has .*q_norm\.weight, which this model has",
        ),
        (
            {"extra__a": torch.ones(1), "extra__b": torch.ones(1)},
            r"has extra\.a and 1 more, which this model has no place for",
        ),
        ({"model__norm__weight": torch.ones(65)}, r"model\.norm\.weight is \[65\] float32 .* calls for \[64\]"),
        ({"lm_head__weight": torch.ones(64, 96)}, r"lm_head\.weight is \[64, 96\] float32 .* for \[96, 64\]"),
        ({"model__norm__weight": torch.ones(64).int()}, r"model\.norm\.weight is \[64\] int32 .* float16/bfloat16"),
        ({"model__norm__weight": torch.ones(64).double()}, r"model\.norm\.weight is \[64\] float64"),
        ({"model__embed_tokens__weight": torch.ones(95, 64)}, r"embed_tokens\.weight is \[95, 64\] .* \[96, 64\]"),
    ],
)
def test_tensors(path: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    change_tensors(path, **changes)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_old_rotary_frequencies_are_no_extra(path: Path) -> None:
    change_tensors(path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load(path)


def test_more_layers_than_the_files_have(path: Path) -> None:
    update_json(path / "config.json", num_hidden_layers=4000)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.3999\.input_layernorm\.weight"):
        load(path)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
@pytest.mark.parametrize(
    ("suffix", "tensor", "message"),
    [
        ("qweight", None, "lacks .*qweight, .* int32"),
        ("scales", None, "lacks .*scales"),
        ("qzeros", None, "lacks .*qzeros"),
        ("qweight", torch.zeros(64, 64, dtype=torch.int32), r"qweight is \[64, 64\] int32"),
        ("qweight", torch.zeros(64, 8), r"qweight is \[64, 8\] float32 .* int32"),
        ("scales", torch.zeros(1, 64), r"scales is \[1, 64\] float32 .* \[2, 64\]"),
        ("weight", torch.zeros(64, 64), "has .*weight, which this model has no place for"),
    ],
)
def test_quantized_tensors(
    copy_of: Callable[[str], Path], kind: str, suffix: str, tensor: torch.Tensor | None, message: str
) -> None:
    path = copy_of(kind)
    change_tensors(path, **{f"{DOWN}.{suffix}".replace(".", "__"): tensor})
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert f"{DOWN}.{suffix}" in str(caught.value)


def test_activation_order_names_the_linear(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("gptq")
    change_tensors(path, **{f"{DOWN}.g_idx".replace(".", "__"): torch.arange(64, dtype=torch.int32) % 2})
    with pytest.raises(UnsupportedError, match=rf"{re.escape(DOWN)}: g_idx .* desc_act = false"):
        load(path)


# Shards


def test_a_missing_shard(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("sharded")
    shard = "model-00002-of-00002.safetensors"
    (path / shard).unlink()
    with pytest.raises(ModelError, match=rf"{INDEX} names {shard}, which is not there"):
        load(path)


def test_a_missing_index(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("sharded")
    (path / INDEX).unlink()
    with pytest.raises(ModelError, match=rf"2 \.safetensors files, no model\.safetensors and no {INDEX}"):
        load(path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map must be an object"),
        ([], "weight_map must be an object"),
        ({NORM: 3}, f"{NORM} is in 3, not a .safetensors file beside the index"),
        ({NORM: "../model.safetensors"}, "not a .safetensors file beside"),
        ({NORM: "/etc/x.safetensors"}, "not a .safetensors file beside"),
        ({NORM: "pytorch_model.bin"}, "not a .safetensors file beside"),
        ({NORM: "a\0.safetensors"}, "which is not there"),
        ({NORM: "\ud800.safetensors"}, "which is not there"),
        ({NORM: "x" * 5000 + ".safetensors"}, "which is not there"),
        ({"ghost": "model-00001-of-00002.safetensors"}, f"ghost is not in this file, although {INDEX} says so"),
    ],
)
def test_a_damaged_index(copy_of: Callable[[str], Path], weight_map: Any, message: str) -> None:
    path = copy_of("sharded")
    update_json(path / INDEX, weight_map=weight_map)
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_tensor_in_two_shards(copy_of: Callable[[str], Path]) -> None:
    path = copy_of("sharded")
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    name = next(iter(shards[0]))
    save_file(shards[1] | {name: shards[0][name]}, path / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=rf"{re.escape(name)} is also in another file"):
        load(path)


# Damaged safetensors


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1, -1000])
def test_a_truncated_file(path: Path, size: int) -> None:
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[:size])
    with pytest.raises(ModelError, match=rf"{FILE}: truncated or"):
        load(path)


def test_bytes_past_the_end(path: Path) -> None:
    with (path / FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelError, match="truncated or damaged"):
        load(path)


def test_a_file_that_shrinks_while_it_is_read(path: Path) -> None:
    file = SafetensorsFile(path / FILE)
    with (path / FILE).open("r+b") as other:
        other.truncate(100)
    with pytest.raises(ModelError, match="ends at byte 100"):
        file.read_into(torch.empty(1000, dtype=torch.uint8), 50)
    file.close()


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": A, "b": B | {"data_offsets": [4, 8]}}, r"b: data begins at byte \d+, but \d+ is next"),  # overlap
        ({"a": A, "b": B | {"data_offsets": [9, 13]}}, r"b: data begins at byte"),  # gap
        ({"a": A}, r"truncated or damaged"),
        ({"a": A, "b": B | {"shape": [2]}}, r"b: F32 \[2\] does not fill data_offsets \[8, 12\]"),
        ({"a": A, "b": B | {"data_offsets": [12, 8]}}, r"b: F32 \[1\] does not fill"),
        ({"a": A, "b": B | {"data_offsets": [-4, 0]}}, r"b: .*must be lists of integers"),
        ({"a": A, "b": B | {"data_offsets": [8]}}, r"b: .*must be lists of integers"),
        ({"a": A, "b": B | {"shape": [True]}}, r"b: .*must be lists of integers"),
        ({"a": A, "b": B | {"shape": [10**4000, 10**4000]}}, r"b: .*must be lists of integers"),
        ({"a": A, "b": B | {"shape": [2**62, 2**62]}}, r"b: F32 .* does not fill"),
        ({"a": A, "b": B | {"shape": [1] * 65}}, r"b: .*must be lists of integers"),
        ({"a": A, "b": B | {"data_offsets": [8, 2**62 + 8], "shape": [2**60]}}, r"truncated or damaged"),
        ({"a": A, "b": B | {"dtype": "F4"}}, r"b: unknown dtype 'F4'; known are F64"),
        ({"a": A, "b": {"dtype": "F32"}}, r"b: must have dtype, shape and data_offsets"),
        ({"a": A, "b": 3}, r"b: must have dtype"),
        (b'{"a": 1, "a": 1}', "a key occurs twice"),
        (b"[" * 100_000, "header is not valid JSON"),
        (b"[]", "header is not a JSON object"),
        (b"\xff", "header is not valid JSON"),
        (b"9" * 5000, "header is not valid JSON"),
    ],
)
def test_a_damaged_header(tmp_path: Path, header: Any, message: str) -> None:
    write(tmp_path / FILE, {"a": A, "b": B}, bytes(12))
    SafetensorsFile(tmp_path / FILE).close()
    write(tmp_path / FILE, header, bytes(12))
    with pytest.raises(ModelError, match=message):
        SafetensorsFile(tmp_path / FILE)


@pytest.mark.parametrize("length", [100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_not_read(path: Path, length: int) -> None:
    """The file is as large as it says where that is possible: sparse, it takes no room."""
    with (path / FILE).open("r+b") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(min(8 + length, 2**42))
    with pytest.raises(ModelError, match=f"header of {length} bytes"):
        load(path)


# Random damage

TEXT = st.sampled_from(["", "F32", "I32", "lm_head.weight", NORM, "\ud800", "dtype", "\0", "x" * 300])
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 64, 2**31, 2**32, 2**60, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan")])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


@st.composite
def edited(draw: st.DrawFn, original: Any) -> Any:
    """JSON with one to three values replaced, dropped, nudged or copied from elsewhere."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(["replace", "nudge", "drop", "copy"]))
        if kind == "drop":
            del container[key]
        elif kind == "nudge" and isinstance(container[key], int):
            container[key] += draw(st.sampled_from([-8, -4, -1, 1, 4, 8]))
        elif kind == "copy":
            other, other_key = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[other_key]) if other_key in keys_of(other) else None
        else:
            container[key] = draw(JSON)
    return value


def keys_of(container: Any) -> Any:
    return container if isinstance(container, dict) else range(len(container))


def load_or_refuse(path: Path) -> bool:
    """Whether it loaded. Any exception but a ModelError fails the test."""
    try:
        load(path)
    except ModelError:
        return False
    return True


@pytest.fixture(scope="module")
def target(sound: Callable[[str], Path]) -> Iterator[Path]:
    """The directory that all examples of a fuzz test overwrite. A large allocation fails as long as this is in use."""
    path = Path(shutil.copytree(sound("dense"), sound("fuzzed")))
    start(path)  # whatever is loaded on first use
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), hard))
    yield path
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_large_allocation_would_show(target: Path) -> None:
    with pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(2 << 30, dtype=torch.uint8)


@FUZZ
@given(data=st.data())
def test_random_header_edits(target: Path, sound: Callable[[str], Path], data: st.DataObject) -> None:
    header, tensors = header_of(sound("dense") / FILE)
    changed = data.draw(edited(header))
    write(target / FILE, changed, tensors)
    if load_or_refuse(target):
        # What still loads says the same: `__metadata__` aside, and tensors of one shape may have changed places.
        kept = {name: {**entry, "data_offsets": 0} for name, entry in header.items() if name != "__metadata__"}
        changed.pop("__metadata__", None)
        assert {name: {**entry, "data_offsets": 0} for name, entry in changed.items()} == kept


@FUZZ
@given(data=st.data())
def test_random_bytes(target: Path, sound: Callable[[str], Path], data: st.DataObject) -> None:
    """A few bytes of length and header overwritten, and perhaps the file cut."""
    content = bytearray((sound("dense") / FILE).read_bytes())
    header_size = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_size - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(content) - 1))
    (target / FILE).write_bytes(content[:cut])
    loaded = load_or_refuse(target)
    assert not loaded or cut is None


@FUZZ
@given(noise=st.binary(max_size=200), length=st.none() | st.integers(0, 2**64 - 1))
def test_noise(target: Path, noise: bytes, length: int | None) -> None:
    write(target / FILE, noise, b"", length)
    assert not load_or_refuse(target)


@pytest.mark.slow
@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("kind", ["dense", "awq", "gptq"])
def test_random_config_edits(sound: Callable[[str], Path], target: Path, kind: str, data: st.DataObject) -> None:
    shutil.copyfile(sound(kind) / FILE, target / FILE)
    config = data.draw(edited(json.loads((sound(kind) / "config.json").read_bytes())))
    (target / "config.json").write_text(json.dumps(config))
    try:
        Checkpoint.open(target).facts()
    except ModelError:
        return
    load_or_refuse(target)
