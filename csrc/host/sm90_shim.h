// Stands in for kernels/sm90.cuh where there is no GPU: the same functions for a plain C++
// compiler, and blocks whose threads are fibers. What may go wrong with the real instructions goes
// wrong here too: copies land late and in any order, products read shared memory only when they are
// waited for, shared memory starts as NaN, and threads that wait for ever are an error.
//
// What a product reads follows the PTX ISA's layouts: 16-byte pieces of 128-byte lines are swizzled
// by address (piece ^ line % 8), lines are a stride of eight apart as the descriptor says, and
// operands that are contiguous along their rows ("Trans") have a leading offset every 64 rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "common/half_types.h"

#if defined(__CUDACC__)
#error "the shim stands in for nvcc; nvcc must not see it"
#endif

#define SK_DEVICE inline

namespace sorted_kernels {

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};

namespace sm90 {

// Inner elements are contiguous, `outer` lines of them are `stride` apart; a box has 64 x `lines`.
struct TensorMap {
  const uint16_t* data;
  int64_t inner, outer, stride;
  int lines;
};

// --- what the scheduler of fibers offers (host_fibers.cpp) ---------------------------------------

int thread_index();
int block_index();
int block_count();
char* shared_memory();
void wait_until(const std::function<bool()>& ready);
void named_sync(int id, int threads);
void copy_later(std::function<void()> copy);
void multiply_later(std::function<void()> product);
void close_products();
void finish_products(int pending);

// Runs `body` in each of a block's threads; throws std::runtime_error if they wait for ever.
void run_block(int block, int blocks, int threads, int shared_bytes, uint64_t seed,
               const std::function<void()>& body);

// --- barriers ------------------------------------------------------------------------------------

struct Barrier {
  uint8_t phase, arrivals, missing, unused;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline void settle(Barrier& barrier) {
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.missing = barrier.arrivals;
  }
}

inline Barrier& barrier_at(uint64_t* word) { return *reinterpret_cast<Barrier*>(word); }

inline void block_sync() { named_sync(0, 384); }
inline void barrier_init(uint64_t* word, int arrivals) {
  barrier_at(word) = {0, uint8_t(arrivals), uint8_t(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive_expect(uint64_t* word, int bytes) {
  barrier_at(word).missing -= 1;
  barrier_at(word).bytes += bytes;
  settle(barrier_at(word));
}
inline void barrier_arrive(uint64_t* word) { barrier_arrive_expect(word, 0); }
inline void barrier_wait(uint64_t* word, int parity) {
  wait_until([=] { return barrier_at(word).phase != parity; });
}

// --- copies --------------------------------------------------------------------------------------

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const char*>(pointer) - shared_memory());
}

inline uint32_t swizzled(uint32_t address) { return address ^ (((address >> 7) & 7) << 4); }

inline void prefetch_map(const TensorMap*) {}

inline void load_box(void* target, const TensorMap* map, uint64_t* barrier, int x, int y) {
  copy_later([=, begin = shared_address(target), from = *map] {
    for (int line = 0; line < from.lines; ++line) {
      for (int i = 0; i < 64; ++i) {
        const bool inside =
            x + i >= 0 && x + i < from.inner && y + line >= 0 && y + line < from.outer;
        const uint16_t value = inside ? from.data[(y + line) * from.stride + x + i] : 0;
        std::memcpy(shared_memory() + swizzled(begin + line * 128 + i * 2), &value, 2);
      }
    }
    barrier_at(barrier).bytes -= from.lines * 128;
    settle(barrier_at(barrier));
  });
}

inline void resize_map(TensorMap* target, const TensorMap& map, TensorMap*, int inner, int outer) {
  *target = map;
  target->inner = inner;
  target->outer = outer;
}

inline void fence_async_proxy() {}

// --- products ------------------------------------------------------------------------------------

template <typename T, bool kTrans>
float operand_element(uint64_t descriptor, int row, int red) {
  const uint32_t begin = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t offset = kTrans
                              ? row / 64 * leading + row % 64 * 2 + red / 8 * stride + red % 8 * 128
                              : row / 8 * stride + row % 8 * 128 + red * 2;
  T value;
  std::memcpy(&value, shared_memory() + swizzled(begin + offset), sizeof(value));
  return to_compute(value);
}

// This thread's share of the product; see the PTX ISA's figure of wgmma's matrix fragment D.
template <typename T, bool kTransA, bool kTransB, int kAccumulators>
void wgmma(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  const int thread = thread_index() % 128;
  multiply_later([=, sums = &d[0]] {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float left[2][16];
    for (int red = 0; red < 16; ++red) {
      left[0][red] = operand_element<T, kTransA>(a, row, red);
      left[1][red] = operand_element<T, kTransA>(a, row + 8, red);
    }
    for (int i = 0; i < kAccumulators; i += 4) {
      for (int side = 0; side < 2; ++side) {
        const int col = i * 2 + thread % 4 * 2 + side;
        for (int red = 0; red < 16; ++red) {
          const float right = operand_element<T, kTransB>(b, col, red);
          sums[i + side] += left[0][red] * right;
          sums[i + side + 2] += left[1][red] * right;
        }
      }
    }
  });
}

inline void wgmma_fence() {}
inline void wgmma_commit() { close_products(); }
template <int kPending>
void wgmma_wait() {
  finish_products(kPending);
}
template <int kRegisters>
void lower_registers() {}
template <int kRegisters>
void raise_registers() {}

// --- global memory -------------------------------------------------------------------------------

inline void fence_device() {}
inline int add_one(int* counter) { return (*counter)++; }
inline float4 load_shared_result(const float4* pointer) { return *pointer; }
inline void reduce_add(float* pointer, float value) { *pointer += value; }
inline void reduce_add(float* pointer, float4 v) {
  pointer[0] += v.x;
  pointer[1] += v.y;
  pointer[2] += v.z;
  pointer[3] += v.w;
}

template <typename T>
uint32_t narrow(float low, float high, T) {
  T pair[2];
  round_to(low, pair[0]);
  round_to(high, pair[1]);
  return uint32_t(pair[1].bits) << 16 | pair[0].bits;
}

}  // namespace sm90
}  // namespace sorted_kernels
