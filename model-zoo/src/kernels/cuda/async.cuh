// Copies that run beside the threads, and barriers of part of a block, of its memory and of the whole grid.
#pragma once
#include "common.cuh"

// Barriers in a block's memory and the copy engine came with Hopper: before it the joint kernel is compiled to nothing, and
// the host does not ask for it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define BEFORE_HOPPER
#endif

// Waits for `WARPS` warps of the block, the same ones each time; all of them where a kernel has no others.
template <uint32_t WARPS>
DEVICE void sync_warps() {
#ifdef __CUDACC__
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
#else
    emulate::sync_some(WARPS * 32);
#endif
}

// A weight matrix of which tiles are copied. `map` is the device's description of it, with boxes of 64 columns, sixteen
// rows and TILE_GROUPS groups of columns, whose sixteens of bytes are swizzled within lines of 128.
struct TiledMatrix {
    const void *map;
    const bf16 *weight;
    uint32_t rows, cols;  // cols is a multiple of 64
};

constexpr uint32_t TILE_GROUPS = 8, TILE_BYTES = TILE_GROUPS * 16 * 64 * 2;

// Where row `r` and column `c` of a copied tile lie in it.
DEVICE uint32_t tile_place(uint32_t r, uint32_t c) {
    return (c / 64 * 16 + r) * 64 + (c % 64 / 8 ^ r % 8) * 8 + c % 8;
}

#ifdef __CUDACC__
// Of what is read once, which makes room first: all else that a step reads stays in the second cache.
DEVICE uint64_t evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

// A barrier in the block's memory: a phase ends when `count` threads have arrived and the bytes that they announced have
// been copied.
struct Barrier {
    uint64_t state;

    DEVICE void init(uint32_t count) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(count) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
        emulate::barrier_init(state, count);
#endif
    }
    DEVICE void arrive() {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(address()) : "memory");
#else
        emulate::barrier_arrive(state, 0);
#endif
    }
    // Arrives, and announces copies of `bytes` bytes in all.
    DEVICE void announce(uint32_t bytes) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(address()), "r"(bytes)
                     : "memory");
#else
        emulate::barrier_arrive(state, bytes);
#endif
    }
    // Until the phase of this parity has ended: the first one's is 0, and the one before it counts as ended.
    DEVICE void wait(uint32_t parity) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        uint32_t ended;
        do {
            asm volatile(
                "{ .reg .pred t; mbarrier.try_wait.parity.shared::cta.b64 t, [%1], %2; selp.u32 %0, 1, 0, t; }"
                : "=r"(ended)
                : "r"(address()), "r"(parity)
                : "memory");
        } while (ended == 0);
#else
        while (!emulate::barrier_ended(state, parity)) emulate::yield();
#endif
    }
    // Copies memory to the block's, addresses and `bytes` multiples of 16, as part of the present phase.
    DEVICE void copy(void *to, const void *from, uint32_t bytes) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
            "l"(from), "r"(bytes), "r"(address())
            : "memory");
#else
        memcpy(to, from, bytes);
        emulate::barrier_copied(state, bytes);
#endif
    }
    // The same of what is read once.
    DEVICE void copy_once(void *to, const void *from, uint32_t bytes) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
                "r"(shared),
            "l"(from), "r"(bytes), "r"(address()), "l"(evict_first())
            : "memory");
#else
        copy(to, from, bytes);
#endif
    }
    // Copies sixteen rows from `row` on, and TILE_GROUPS groups of 64 columns from `group` on, of a matrix to the block's
    // memory at a multiple of 1,024, as part of the present phase: TILE_BYTES bytes, zeros where the matrix has nothing.
    DEVICE void copy(void *to, const TiledMatrix &matrix, uint32_t row, uint32_t group) {
#ifdef BEFORE_HOPPER
        __trap();
#elif defined(__CUDACC__)
        const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
            "l"(matrix.map), "r"(0), "r"(row), "r"(group), "r"(address()), "l"(evict_first())
            : "memory");
#else
        for (uint32_t r = 0; r < 16; r++)
            for (uint32_t c = 0; c < TILE_GROUPS * 64; c++) {
                const uint32_t column = group * 64 + c;
                const bool inside = row + r < matrix.rows && column < matrix.cols;
                static_cast<bf16 *>(to)[tile_place(r, c)] =
                    inside ? matrix.weight[static_cast<size_t>(row + r) * matrix.cols + column] : 0;
            }
        emulate::barrier_copied(state, TILE_BYTES);
#endif
    }

#ifdef __CUDACC__
    DEVICE uint32_t address() { return static_cast<uint32_t>(__cvta_generic_to_shared(&state)); }
#endif
};

// Tells the grid's other blocks that `WARPS` warps of this one have come to the end of a stage.
template <uint32_t WARPS>
DEVICE void arrive([[maybe_unused]] uint32_t *arrived) {
    sync_warps<WARPS>();
#ifdef __CUDACC__
    if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
#endif
}

// Until blocks have arrived `count` times in all. What they wrote before is seen then. Where blocks run one after another
// nobody waits: their stages are launches of their own.
template <uint32_t WARPS>
DEVICE void await([[maybe_unused]] uint32_t *arrived, [[maybe_unused]] uint32_t count) {
#ifdef __CUDACC__
    if (threadIdx.x == 0) {
        uint32_t now;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
        } while (now < count);
    }
#endif
    sync_warps<WARPS>();
}
