// y = x * W^T by the parts of w4a16_units.cuh, in one launch. One more warp feeds the others (up to 16 tokens another sums x for
// them): weights do not depend on the kernel before, so the ring fills with them before that has ended.
//
// Compile-time: those of w4a16_units.cuh, GATED (y = silu(gate) * up), ROTATED (heads are turned, keys and values cached).
#if WGMMA
#include "w4a16_wide.cuh"
#else
#include "w4a16_few.cuh"
#endif

constexpr int kThreads = kConsumers + (WGMMA ? 32 : 64);

struct Arguments {
    Linear linear;
    Parts parts;
    Rotation rotation;
    int tokens;
};

// One lane fills the slots.
__device__ __forceinline__ void feed(const Linear& linear, Shared& shared, int begin, int end) {
    WeightFeed weights(linear, begin);
    ColumnFeed columns(linear, begin);
    asm volatile("prefetch.tensormap [%0];" ::"l"(linear.x_map) : "memory");
    const int early = min(end - begin, kSlots);
    for (int slot = 0; slot < early; ++slot) weights.fetch(shared, slot);
    wait_for_dependencies();
    for (int slot = 0; slot < early; ++slot) columns.fetch(shared, slot);
    Place place{0, 0};
    for (int step = begin + early; step < end; ++step, place.advance()) {
        barrier_wait(shared_address(&shared.empty[place.slot]), place.parity);
        weights.fetch(shared, place.slot);
        columns.fetch(shared, place.slot);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) w4a16
(const __grid_constant__ Arguments args) {
    extern __shared__ __align__(1024) byte memory[];
    Shared& shared = *(Shared*)memory;
    const Linear& linear = args.linear;
    // Blocks wait only for parts of blocks that were started before them.
    const int mine = gridDim.x - 1 - blockIdx.x, begin = linear.begin(mine), end = linear.begin(mine + 1);

    if (threadIdx.x == kConsumers) open_ring(shared);
    __syncthreads();
    launch_dependents();  // they wait for this kernel's end before they read y; until then they fill their own rings
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // so the compiler knows that a warp stays together
    const int lane = threadIdx.x % 32, tokens = args.tokens;
    Place place{0, 0};
    if (warp == kConsumers / 32) {
        if (lane == 0) feed(linear, shared, begin, end);
        return;
    }
#if !WGMMA
    if (warp == kConsumers / 32 + 1) {
        sum_columns(shared, end - begin, place);
        return;
    }
#endif
    consume(
        shared, linear, args.parts, tokens, mine, warp, place,
        [&](int first_row) {
#if ROTATED
            return fetch_turns(linear, args.rotation, tokens, first_row, lane);
#else
            return fetch_bias(linear, first_row + lane / 4, 8);
#endif
        },
        [&](const float (&sums)[kSums], const Early& early, int first_row) {
#if ROTATED
            store_heads(linear, args.rotation, sums, early, tokens, first_row, lane);
#elif GATED
            store_gated(linear, sums, tokens, first_row, lane);
#else
            store_rows(linear, sums, early, tokens, first_row, lane);
#endif
        });
}
