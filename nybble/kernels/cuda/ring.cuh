// One warp's private ring of shared-memory slots, filled asynchronously from device memory.
// sm_90: one lane issues one bulk copy a slot, an mbarrier a slot tells when it has landed. sm_80: all lanes issue
// 16-byte cp.async, one commit group a slot. No other warp takes part, so the block needs no barrier.
#pragma once
#include "ptx.cuh"

template <int kSlots, int kBytes>
struct Ring {
    static_assert(kBytes % 16 == 0, "copies move 16 bytes at a time");
    static constexpr int kSharedBytes = kSlots * kBytes;

    byte* slots;
    unsigned long long* barriers;  // [kSlots]
    int lane;

    __device__ __forceinline__ const byte* slot(int index) const { return slots + index * kBytes; }

#if __CUDA_ARCH__ >= 900
    __device__ __forceinline__ void start() const {
        if (lane != 0) return;
        for (int i = 0; i < kSlots; ++i)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barriers + i)));
        asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
    }

    // Every lane calls it, after all of them have finished with what the slot held. `wanted` false: nothing more to come.
    __device__ __forceinline__ void fill(int index, const byte* source, bool wanted) const {
        if (lane != 0 || !wanted) return;
        unsigned barrier = shared_address(barriers + index);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "n"(kBytes) : "memory");
        asm volatile(
            "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"  // weights are read once
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
            "policy;}" ::"r"(shared_address(slot(index))),
            "l"(source), "n"(kBytes), "r"(barrier)
            : "memory");
    }

    // Waits for the turn-th use of a slot.
    __device__ __forceinline__ void wait(int index, int turn) const {
        unsigned barrier = shared_address(barriers + index), done = 0;
        while (!done)
            asm volatile(
                "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                : "=r"(done) : "r"(barrier), "r"(turn & 1) : "memory");
    }
#else
    __device__ __forceinline__ void start() const {}

    __device__ __forceinline__ void fill(int index, const byte* source, bool wanted) const {
        if (wanted)
            for (int at = lane * 16; at < kBytes; at += 512)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(slot(index) + at)),
                             "l"(source + at) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");  // an empty one too: wait() counts groups
    }

    __device__ __forceinline__ void wait(int, int) const {
        asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 1) : "memory");
        __syncwarp();
    }
#endif
};
