"""`nybble bench`: one file for each of its commands."""

from __future__ import annotations

import typer

from nybble.commands import bench_kernels, bench_latency, bench_serve, bench_startup, bench_step, bench_throughput

app = typer.Typer(
    help="Measure how fast: a running server, or nybble itself offline.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.command(no_args_is_help=True)(bench_serve.serve)
app.command(no_args_is_help=True)(bench_latency.latency)
app.command(no_args_is_help=True)(bench_throughput.throughput)
app.command(no_args_is_help=True)(bench_startup.startup)
app.command()(bench_kernels.kernels)
app.command(no_args_is_help=True)(bench_step.step)
