// Attention of sequences that bring one token each, over the paged cache; meaning and shapes: nybble/kernels/attention.py.
//
// Work. The tiles of kKeys keys of all pairs of a sequence and a KV head lie in one row, which is cut into as many equal ranges
// as there are blocks, whatever the lengths. The block that has a pair's first tile adds what others found in the rest of it.
// Each warp walks its own 16 keys of every tile with a ring and a softmax state of its own; warps meet where a pair ends.
//
// Numbers. S^T = K Q^T and O^T += V^T P^T by mma.sync: 16 keys, or 16 features, against up to 8 query heads. Softmax runs online
// in base 2 and fp32; P is rounded to 16 bit.
//
// All keys but a row's newest are taken for old ones: the ring fills with them before the kernel in front has ended. That asks
// of the step that a kernel launched the ordinary way lies between what wrote them, block tables or lengths and this one.
//
// Compile-time: BF16, HEAD_DIM (a multiple of 16), GROUP (query heads of a KV head, up to 8), WARPS, STAGES.
#include "parts.cuh"

constexpr int kWarpKeys = 16, kKeys = kWarpKeys * WARPS, kThreads = 32 * WARPS, kHeads = 8;
constexpr int kChunks = HEAD_DIM / 8, kPitch = (kChunks + 7) / 8 * 8;  // 16-byte chunks of a row; in shared memory
constexpr int kTileBytes = kWarpKeys * kPitch * 16, kSteps = HEAD_DIM / 16;
constexpr int kResultPitch = HEAD_DIM + 4;  // floats; a warp's results lie in the stage that it read last
static_assert(HEAD_DIM % 16 == 0 && GROUP <= kHeads && kHeads * kResultPitch * 4 <= 2 * kTileBytes, "");

struct Arguments {
    const float16 *q, *key_cache, *value_cache;  // caches [blocks, kv_heads, 1 << block_bits, HEAD_DIM]
    const int *block_tables, *seq_lens, *query_start;
    float16* output;  // [tokens, kv_heads * GROUP, HEAD_DIM]
    float* parts;     // see Parts; all missing between launches
    long long q_token_stride, q_head_stride, table_stride;
    int rows, kv_heads, block_bits, window;  // window 0: none
    float scale;                             // of scores in base 2
};

struct Shared {
    byte ring[WARPS][STAGES][2][kTileBytes];  // keys, values
    float2 states[WARPS][kHeads];             // maximum, sum
};

// What a sequence has to be attended to.
struct Sequence {
    int length, lowest, first, tiles;  // keys lowest ... length - 1, in tiles from `first` on; other work has no tiles
    __device__ __forceinline__ Sequence(const Arguments& args, int row) : length(0), lowest(0), first(0), tiles(0) {
        if (row >= args.rows || args.query_start[row + 1] - args.query_start[row] != 1) return;
        length = args.seq_lens[row];
        lowest = args.window ? max(length - args.window, 0) : 0;
        first = lowest / kWarpKeys * kWarpKeys;
        tiles = (length - first + kKeys - 1) / kKeys;
    }
};

__device__ __forceinline__ int warp_sum(int value) {
#pragma unroll
    for (int apart = 16; apart; apart /= 2) value += __shfl_xor_sync(kFullWarp, value, apart);
    return value;
}

// How the tiles are dealt out.
struct Ranges {
    unsigned long long total;
    int blocks;  // that have any
    __device__ __forceinline__ Ranges(const Arguments& args) {
        int tiles = 0;
        for (int row = threadIdx.x % 32; row < args.rows; row += 32) tiles += Sequence(args, row).tiles;
        total = (unsigned long long)warp_sum(tiles) * args.kv_heads;
        const unsigned long long most = (total + 1) / 2;  // more blocks would cost more to join than they save
        blocks = most < gridDim.x ? int(most) : gridDim.x;
    }
    __device__ __forceinline__ int begin(int block) const { return int(total * block / blocks); }
    __device__ __forceinline__ int owner(int tile) const { return int(((tile + 1ull) * blocks - 1) / total); }
};

// A tile of a pair.
struct Cursor {
    int row, head, tile;
    Sequence sequence;

    // The `index`-th of all tiles; every lane calls it.
    __device__ __forceinline__ Cursor(const Arguments& args, int index) : row(0), head(0), tile(0), sequence(args, args.rows) {
        for (int base = 0; base < args.rows; base += 32) {
            const int lane = threadIdx.x % 32, mine = Sequence(args, base + lane).tiles * args.kv_heads;
            int sum = mine;
#pragma unroll
            for (int apart = 1; apart < 32; apart *= 2) {
                const int before = __shfl_up_sync(kFullWarp, sum, apart);
                if (lane >= apart) sum += before;
            }
            const unsigned after = __ballot_sync(kFullWarp, sum > index);
            if (after) {
                const int found = __ffs(after) - 1;
                row = base + found;
                sequence = Sequence(args, row);
                const int within = index - __shfl_sync(kFullWarp, sum - mine, found);
                head = within / sequence.tiles, tile = within % sequence.tiles;
                return;
            }
            index -= __shfl_sync(kFullWarp, sum, 31);
        }
    }
    // To the next tile, which must exist.
    __device__ __forceinline__ void advance(const Arguments& args) {
        if (++tile < sequence.tiles) return;
        tile = 0;
        if (++head < args.kv_heads) return;
        head = 0;
        do sequence = Sequence(args, ++row);
        while (sequence.tiles == 0);
    }
    __device__ __forceinline__ int first_key(int warp) const { return sequence.first + tile * kKeys + warp * kWarpKeys; }
};

__device__ __forceinline__ void copy_async(unsigned to, const void* from, bool is_there) {  // else zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
    __syncwarp();
}
// Chunks are swizzled, so that eight rows' are read without conflicts.
__device__ __forceinline__ unsigned chunk_at(int row, int chunk) { return (row * kPitch + (chunk ^ row % 8)) * 16; }

// The key that this step adds to a sequence: its row in a warp's tile, or -1, and where it lies in the cache.
struct Newest {
    int row;
    long long from;
};

// Brings a warp's keys and values of one tile after the other.
struct Feed {
    const Arguments& args;
    Cursor at;
    unsigned ring;  // the warp's
    int warp, lane, blocks[2];  // of its first and its last eight keys

    __device__ __forceinline__ Feed(const Arguments& of, const Cursor& from, unsigned ring, int warp, int lane)
        : args(of), at(from), ring(ring), warp(warp), lane(lane) { look_up(); }
    // Asked for a tile ahead of its use.
    __device__ __forceinline__ void look_up() {
        const int key = at.first_key(warp);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            blocks[i] = key + 8 * i < at.sequence.length
                            ? args.block_tables[at.row * args.table_stride + ((key + 8 * i) >> args.block_bits)] : 0;
    }
    __device__ __forceinline__ long long offset(int key, int block) const {
        const int within = key & (1 << args.block_bits) - 1;
        return ((((long long)block * args.kv_heads + at.head) << args.block_bits) + within) * HEAD_DIM;
    }
    __device__ __forceinline__ void copy(int stage, int row, int chunk, long long from, bool is_there) const {
        const unsigned to = ring + stage * 2 * kTileBytes + chunk_at(row, chunk);
        copy_async(to, args.key_cache + from + chunk * 8, is_there);
        copy_async(to + kTileBytes, args.value_cache + from + chunk * 8, is_there);
    }
    // What lies outside of a sequence may be anything, NaN too, which no weight of 0 would silence: zeros take its place.
    // `early`: not the key that this step adds.
    __device__ __forceinline__ void fetch(int stage, bool early) const {
        const int key = at.first_key(warp), length = at.sequence.length;
        if (key >= length) return;
        const long long from[2] = {offset(key, blocks[0]), offset(key + 8, blocks[1]) - 8 * HEAD_DIM};
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            const int row = (j * 32 + lane) / kChunks, chunk = (j * 32 + lane) % kChunks;
            const bool is_there = key + row < length && key + row >= at.sequence.lowest;
            if (!early || key + row != length - 1)
                copy(stage, row, chunk, is_there ? (row < 8 ? from[0] : from[1]) + row * HEAD_DIM : 0, is_there);
        }
    }
    // The key that fetch(stage, true) leaves out.
    __device__ __forceinline__ Newest newest() const {
        const int row = at.sequence.length - 1 - at.first_key(warp);
        const bool is_here = row >= 0 && row < kWarpKeys;
        return {is_here ? row : -1, is_here ? offset(at.sequence.length - 1, row < 8 ? blocks[0] : blocks[1]) : 0};
    }
    __device__ __forceinline__ void fetch_newest(int stage, const Newest& newest) const {
        if (newest.row >= 0)
            for (int chunk = lane; chunk < kChunks; chunk += 32) copy(stage, newest.row, chunk, newest.from, true);
    }
    __device__ __forceinline__ void advance() {
        at.advance(args);
        look_up();
    }
};

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&a)[4], unsigned at) {
    if (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
            : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ unsigned transpose(unsigned pair) {  // an 8 x 8 matrix, two elements a lane
    unsigned other;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
    return other;
}
__device__ __forceinline__ unsigned pack(float low, float high) {
    return from_float(low) | unsigned(from_float(high)) << 16;
}
__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
constexpr float kNone = -3.4e38f;  // the maximum over no keys: finite, so that differences are numbers

// One warp's softmax over the keys that it has seen. Lanes hold heads 2 (lane % 4) and its neighbour.
struct Softmax {
    unsigned q[kSteps][2];
    float maximum[2], sum[2];  // sum: of the lane's own keys
    float acc[kSteps][4];      // features 16 i + lane / 4 and 8 below it, of both heads each

    __device__ __forceinline__ void start(const Arguments& args, int row, int head, int lane) {
        const int mine = lane / 4;
        const float16* from = args.q + args.query_start[row] * args.q_token_stride +
                              (head * GROUP + mine) * args.q_head_stride + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                q[i][half] = mine < GROUP ? __ldcg((const unsigned*)(from + i * 16 + half * 8)) : 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
        }
        maximum[0] = maximum[1] = kNone, sum[0] = sum[1] = 0.f;
    }
    // `keys`: where the stage lies; key: its first.
    __device__ __forceinline__ void add(unsigned keys, int key, const Sequence& sequence, float scale, int lane) {
        float parts[2][4] = {};  // two short chains
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            unsigned a[4];
            load_matrices<false>(a, keys + chunk_at(lane % 16, 2 * i + lane / 16));
            mma(parts[i % 2], a, q[i][0], q[i][1]);
        }
        float p[4], shrink[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int mine = key + lane / 4 + i / 2 * 8;
            p[i] = mine < sequence.length && mine >= sequence.lowest ? (parts[0][i] + parts[1][i]) * scale : kNone;
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float top = fmaxf(fmaxf(p[j], p[2 + j]), maximum[j]);
#pragma unroll
            for (int apart = 4; apart < 32; apart *= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, apart));
            shrink[j] = power_of_2(maximum[j] - top);
            maximum[j] = top;
            p[j] = p[j] == kNone ? 0.f : power_of_2(p[j] - top);
            p[2 + j] = p[2 + j] == kNone ? 0.f : power_of_2(p[2 + j] - top);
            sum[j] = sum[j] * shrink[j] + p[j] + p[2 + j];
        }
        const unsigned b[2] = {transpose(pack(p[0], p[1])), transpose(pack(p[2], p[3]))};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            unsigned a[4];
            load_matrices<true>(a, keys + kTileBytes + chunk_at(lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i][j] *= shrink[j % 2];
            mma(acc[i], a, b[0], b[1]);
        }
    }
    // Where the block's other warps find it: `results` [kHeads][kResultPitch].
    __device__ __forceinline__ void share(float* results, float2* states, int lane) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int apart = 4; apart < 32; apart *= 2) sum[j] += __shfl_xor_sync(kFullWarp, sum[j], apart);
            const int head = lane % 4 * 2 + j;
            if (lane < 4) states[head] = make_float2(maximum[j], sum[j]);
            if (head < GROUP)
#pragma unroll
                for (int i = 0; i < 2 * kSteps; ++i)
                    results[head * kResultPitch + i * 8 + lane / 4] = acc[i / 2][i % 2 * 2 + j];
        }
    }
};

// Four features of one head, over some of the keys.
struct Part {
    float4 values;
    float maximum, sum;
    __device__ __forceinline__ void add(const float4& more, float more_maximum, float more_sum) {
        const float top = fmaxf(maximum, more_maximum), a = power_of_2(maximum - top), b = power_of_2(more_maximum - top);
        values.x = values.x * a + more.x * b, values.y = values.y * a + more.y * b;
        values.z = values.z * a + more.z * b, values.w = values.w * a + more.w * b;
        maximum = top, sum = sum * a + more_sum * b;
    }
};

constexpr int kPart = GROUP * HEAD_DIM / 4, kAtOnce = HEAD_DIM > 128 ? 2 : 4;  // threads' values in a part; parts in flight

// What blocks leave for each other, see parts.cuh.
struct Parts {
    float4* values;  // [blocks, kPart]
    float2* states;  // [blocks, kPart], maximum and sum
    __device__ __forceinline__ Parts(const Arguments& args)
        : values((float4*)args.parts), states((float2*)(values + gridDim.x * kPart)) {}

    __device__ __forceinline__ void put(int at, const Part& part) const {
        store_part(values + at, part.values);
        store_part(states + at, make_float2(part.maximum, part.sum));
    }
    __device__ __forceinline__ void ask(int at, float4& value, float2& state) const {
        value = load_part(values + at), state = load_part(states + at);
    }
    __device__ __forceinline__ void clear(int at) const { clear_part(values + at), clear_part(states + at); }
};

// Adds to the thread's values `index` and, if there are any, `index` + kThreads what blocks first ... last left, in this order.
__device__ __forceinline__ void collect(Part (&part)[2], const Parts& parts, int index, int first, int last) {
    const bool both = index + kThreads < kPart;
    for (int base = first; base <= last; base += kAtOnce) {
        float4 values[kAtOnce][2];
        float2 states[kAtOnce][2];
        const int count = min(last - base + 1, kAtOnce);
        bool all;
        do {  // all are asked for at once: one that is late costs no more than one way
            all = true;
#pragma unroll
            for (int i = 0; i < 2 * kAtOnce; ++i)
                if (i / 2 < count && (i % 2 == 0 || both))
                    parts.ask((base + i / 2) * kPart + index + i % 2 * kThreads, values[i / 2][i % 2], states[i / 2][i % 2]);
#pragma unroll
            for (int i = 0; i < 2 * kAtOnce; ++i)
                if (i / 2 < count && (i % 2 == 0 || both))
                    all &= !(is_missing(values[i / 2][i % 2]) || is_missing(states[i / 2][i % 2]));
        } while (!all);
#pragma unroll
        for (int i = 0; i < 2 * kAtOnce; ++i)
            if (i / 2 < count && (i % 2 == 0 || both)) {
                part[i % 2].add(values[i / 2][i % 2], states[i / 2][i % 2].x, states[i / 2][i % 2].y);
                parts.clear((base + i / 2) * kPart + index + i % 2 * kThreads);
            }
    }
}

__device__ __forceinline__ uint2 packed(const float4& v, float factor) {
    return make_uint2(pack(v.x * factor, v.y * factor), pack(v.z * factor, v.w * factor));
}

// A thread's values from what the block's warps found.
__device__ __forceinline__ Part joined(const Shared& shared, int stage, int index) {
    const int head = index * 4 / HEAD_DIM, feature = index * 4 % HEAD_DIM;
    Part part{{0.f, 0.f, 0.f, 0.f}, kNone, 0.f};
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        const float2 state = shared.states[warp][head];
        const float* results = (const float*)shared.ring[warp][stage];
        part.add(*(const float4*)(results + head * kResultPitch + feature), state.x, state.y);
    }
    return part;
}

// The warps' results over this block's part of a pair become the pair's, or what the block leaves to the one that opened it.
__device__ __forceinline__ void finish(const Arguments& args, const Shared& shared, int stage, const Cursor& at, int mine,
                                       bool opened, int last) {
    const Parts parts(args);
    uint2* to = (uint2*)args.output + ((long long)args.query_start[at.row] * args.kv_heads + at.head) * kPart;
    for (int index = threadIdx.x; index < kPart; index += 2 * kThreads) {
        Part part[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (index + i * kThreads < kPart) part[i] = joined(shared, stage, index + i * kThreads);
        if (opened) collect(part, parts, index, mine + 1, last);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int mine_at = index + i * kThreads;
            if (mine_at >= kPart) continue;
            if (opened)
                to[mine_at] = packed(part[i].values, 1.f / part[i].sum);
            else
                parts.put(mine * kPart + mine_at, part[i]);
        }
    }
}

// Rows that fill up a batch attend to nothing; their results are zeros.
__device__ __forceinline__ void clear_padding(const Arguments& args) {
    const int width = args.kv_heads * GROUP * HEAD_DIM / 4;
    for (int row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const int token = args.query_start[row];
        if (args.seq_lens[row] != 0 || args.query_start[row + 1] - token != 1) continue;
        for (int i = threadIdx.x; i < width; i += kThreads) ((uint2*)args.output)[(long long)token * width + i] = make_uint2(0, 0);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) attention_decode(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(128) byte memory[];
    Shared& shared = *(Shared*)memory;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    launch_dependents();
    // Blocks wait only for parts of blocks that were started before them.
    const int mine = gridDim.x - 1 - blockIdx.x;
    const Ranges ranges(args);
    if (mine >= ranges.blocks) {
        wait_for_dependencies();
        clear_padding(args);
        return;
    }
    const int begin = ranges.begin(mine), end = ranges.begin(mine + 1);
    const unsigned ring = shared_address(shared.ring[warp]);
    Cursor at(args, begin);
    Feed feed(args, at, ring, warp, lane);
    Newest newest[STAGES];
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage)
        if (begin + stage < end) {
            newest[stage] = feed.newest();
            feed.fetch(stage, true);
            if (begin + stage + 1 < end) feed.advance();
        }
    wait_for_dependencies();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage)
        if (begin + stage < end) feed.fetch_newest(stage, newest[stage]);
    commit_copies();

    Softmax softmax;
    for (int step = begin, stage = 0; step < end; ++step) {
        if (step == begin || at.tile == 0) softmax.start(args, at.row, at.head, lane);
        if (step == begin)
            await_copies<0>();
        else
            await_copies<STAGES - 1>();
        const int key = at.first_key(warp), pair = step - at.tile;
        if (key < at.sequence.length) softmax.add(ring + stage * 2 * kTileBytes, key, at.sequence, args.scale, lane);
        __syncwarp();
        if (step + 1 == end || at.tile + 1 == at.sequence.tiles) {
            softmax.share((float*)shared.ring[warp][stage], shared.states[warp], lane);
            __syncthreads();
            finish(args, shared, stage, at, mine, pair >= begin, ranges.owner(pair + at.sequence.tiles - 1));
            __syncthreads();
        }
        if (step + STAGES < end) {
            feed.fetch(stage, false);
            if (step + STAGES + 1 < end) feed.advance();
        }
        commit_copies();
        if (step + 1 < end) at.advance(args);
        if (++stage == STAGES) stage = 0;
    }
    clear_padding(args);
}
