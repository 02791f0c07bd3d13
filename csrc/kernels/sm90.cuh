// The sm_90a instructions that the GEMM is made of, a function each (PTX ISA 8). host/sm90_shim.h
// has the same functions for a plain C++ compiler.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/half_types.h"
#include "kernels/wgmma_sm90.cuh"

#define SK_DEVICE __device__ __forceinline__

namespace sorted_kernels::sm90 {

using TensorMap = CUtensorMap;

SK_DEVICE int thread_index() { return threadIdx.x; }
SK_DEVICE int block_index() { return blockIdx.x; }
SK_DEVICE int block_count() { return gridDim.x; }
SK_DEVICE void block_sync() { __syncthreads(); }

SK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- barriers in shared memory -------------------------------------------------------------------

SK_DEVICE void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
SK_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

SK_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives, and has the phase wait for that many bytes of copies too.
SK_DEVICE void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity has ended.
SK_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Barrier of some of a block's threads; 0 is the whole block's.
SK_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- bulk tensor copies --------------------------------------------------------------------------

SK_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at element (x, y), x inner, to shared memory; zeros beyond the extents.
SK_DEVICE void load_box(void* target, const TensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// Copies a map through shared memory to `target` in global memory, with other extents. One whole
// warp calls it; afterwards the calling block may use it.
SK_DEVICE void resize_map(TensorMap* target, const TensorMap& map, TensorMap* shared, int inner,
                          int outer) {
  const int lane = threadIdx.x % 32;
  reinterpret_cast<uint32_t*>(shared)[lane] = reinterpret_cast<const uint32_t*>(&map)[lane];
  __syncwarp();
  const uint32_t address = shared_address(shared);
  if (lane == 0) {
    asm volatile(
        "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 0, %1;" ::"r"(address),
        "r"(inner)
        : "memory");
    asm volatile(
        "tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" ::"r"(address),
        "r"(outer)
        : "memory");
  }
  __syncwarp();
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
      "[%0], [%1], 128;" ::"l"(target),
      "r"(address)
      : "memory");
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(target) : "memory");
  __syncwarp();
}

// Orders this thread's ordinary writes to shared memory before the tensor cores' reads.
SK_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- tensor cores --------------------------------------------------------------------------------

SK_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SK_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of this thread's committed groups are under way.
template <int kPending>
SK_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kRegisters>
SK_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
SK_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- global memory -------------------------------------------------------------------------------

SK_DEVICE void fence_device() { __threadfence(); }
SK_DEVICE int add_one(int* counter) { return atomicAdd(counter, 1); }

// Past the L1 cache: another block has written it.
SK_DEVICE float4 load_shared_result(const float4* pointer) { return __ldcg(pointer); }

// Adds without reading: the addition is the L2 cache's, to which subnormal numbers are zero. No
// other block adds to the same elements.
SK_DEVICE void reduce_add(float* pointer, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

SK_DEVICE void reduce_add(float* pointer, float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "f"(v.x), "f"(v.y),
               "f"(v.z), "f"(v.w)
               : "memory");
}

// Two floats, rounded to nearest even; the first is the lower half.
SK_DEVICE uint32_t narrow(float low, float high, BFloat16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

SK_DEVICE uint32_t narrow(float low, float high, Float16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

}  // namespace sorted_kernels::sm90
