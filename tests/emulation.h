// Runs a CUDA kernel on the CPU, for tests only: include it before the .cu and compile with g++.
//
// A thread of the kernel is a fiber: it has a stack of its own and runs until it reaches a barrier,
// finishes, or shuffles. With EMULATION_THREADS it is a std::thread, much slower, so that
// ThreadSanitizer sees which accesses no barrier separates. Blocks run one after the other.
//
// What it finds beyond wrong results: shared memory read before it was written (it starts as NaN)
// or written beyond its end, barriers that threads reach at different lines or not at all, shuffles
// that name a lane which has left, and, by running threads and blocks in a random order
// (`emulation_shuffle`), a thread or block that relies on another having run before it.
//
// Not emulated: time, registers, bank conflicts, blocks that run at the same time.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#ifdef EMULATION_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#endif

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    int x, y, z;
    dim3(int x = 1, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
struct float4 {
    float x, y, z, w;
};

typedef void *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorUnknown = 999 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// ---- half and bfloat16: rounded to nearest, ties to even, as the GPU does ----

struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half(float x) { return {(_Float16)x}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- threads ----

dim3 blockIdx, blockDim, gridDim;
thread_local dim3 threadIdx;

constexpr int SHARED_BYTES = 227 * 1024;  // what a block may have on an H100
alignas(16) float4 shared[SHARED_BYTES / sizeof(float4)];

namespace emulation {

constexpr int LANES = 32, MOST = 1024;
enum State { READY, AT_BLOCK, AT_WARP, DONE };

struct Thread {
    int index;
    State state;
    int line;  // of the barrier it waits at
};

std::string error;  // what the kernel did wrong; empty if nothing
int seed = 0;       // 0: threads and blocks in order
uint64_t slots[MOST];
thread_local Thread *self;
int num_threads;  // of a block
void (*run_kernel)(void *);
void *kernel_arguments;

void wait(State where, int line);  // at a barrier

inline void fail(const std::string &message) {
    if (error.empty()) error = message;
}

template <typename X>
X shuffle_xor(unsigned mask, X x, int lane_mask, int line) {
    if (mask != 0xffffffff) fail("line " + std::to_string(line) + ": shuffle without a full mask");
    memcpy(&slots[self->index], &x, sizeof x);
    wait(AT_WARP, line);
    memcpy(&x, &slots[self->index ^ lane_mask], sizeof x);
    wait(AT_WARP, -line);  // before the slot is used again
    return x;
}

// C += A B by the tensor cores: (16, 16) by (16, 8). Where the lanes hold A, B and C is written in
// the PTX manual, "Matrix Fragments for mma.m16n8k16".
template <typename Two>
void mma(int line, float (&c)[4], Two a0, Two a1, Two a2, Two a3, Two b0, Two b1) {
    static Two a[MOST][4], b[MOST][2];
    Two *my_a = a[self->index], *my_b = b[self->index];
    my_a[0] = a0, my_a[1] = a1, my_a[2] = a2, my_a[3] = a3, my_b[0] = b0, my_b[1] = b1;
    wait(AT_WARP, line);
    const int lane = self->index % LANES, first = self->index - lane;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const Two x = a[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
            const Two y = b[first + column * 4 + k % 8 / 2][k / 8];
            c[i] += __bfloat162float(x.at[k % 2]) * __bfloat162float(y.at[k % 2]);
        }
    }
    wait(AT_WARP, -line);  // before the registers are used again
}

#ifndef EMULATION_THREADS

struct Fiber : Thread {
    jmp_buf here;
    ucontext_t start;
    bool started;
    std::vector<char> stack;
};

std::vector<Fiber> fibers;
jmp_buf scheduler;

// Fibers switch with _setjmp and _longjmp, which make no system call; ucontext only makes stacks.
inline void leave() {
    if (!_setjmp(static_cast<Fiber *>(self)->here)) _longjmp(scheduler, 1);
}

void wait(State where, int line) {
    self->state = where;
    self->line = line;
    leave();
}

inline void live() {  // a fiber outlives its block and serves the next one
    for (;;) {
        run_kernel(kernel_arguments);
        self->state = DONE;
        leave();
    }
}

inline void resume(Fiber &f) {
    self = &f, threadIdx.x = f.index;
    if (_setjmp(scheduler)) return;
    if (f.started) _longjmp(f.here, 1);
    f.started = true;
    setcontext(&f.start);
}

inline void make_fibers() {
    fibers.resize(MOST);
    for (Fiber &f : fibers) {
        f.stack.resize(64 * 1024);
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.data();
        f.start.uc_stack.ss_size = f.stack.size();
        makecontext(&f.start, live, 0);
        f.started = false;
    }
}

// All live threads of [from, to) wait at one barrier: let them go on.  -> whether they do
inline bool release(int from, int to, State where) {
    int line = 0;
    bool any = false;
    for (int i = from; i < to; ++i) {
        if (fibers[i].state == DONE) continue;
        if (fibers[i].state != where) return false;
        if (any && fibers[i].line != line)
            fail("divergent barrier: lines " + std::to_string(std::abs(line)) + " and " +
                 std::to_string(std::abs(fibers[i].line)));
        any = true, line = fibers[i].line;
    }
    for (int i = from; i < to; ++i)
        if (fibers[i].state == where) fibers[i].state = READY;
    return any;
}

inline void check_shuffles() {  // a full mask names lanes that have left
    for (int i = 0; i < num_threads; ++i)
        if (fibers[i].state == DONE)
            for (int j = i / LANES * LANES; j < (i / LANES + 1) * LANES; ++j)
                if (fibers[j].state == AT_WARP) fail("warp barrier or shuffle without all lanes");
}

inline void run_block(const std::vector<int> &order) {
    for (;;) {
        for (int i : order)
            if (fibers[i].state == READY) resume(fibers[i]);
        check_shuffles();
        bool on = release(0, num_threads, AT_BLOCK);
        for (int w = 0; w < num_threads; w += LANES) on |= release(w, w + LANES, AT_WARP);
        if (!error.empty()) break;
        if (on) continue;
        for (int i = 0; i < num_threads; ++i)
            if (fibers[i].state != DONE) fail("deadlock: some threads never reach a barrier");
        break;
    }
    if (!error.empty()) fibers.clear();  // some are stuck inside the kernel
}

inline Thread *thread(int i) {  // assigning to it leaves a fiber's stack alone
    if (fibers.empty()) make_fibers();
    return &fibers[i];
}

#else

// Trap: std::barrier would hide races from ThreadSanitizer; a mutex and a condition do not.
struct Barrier {
    std::mutex mutex;
    std::condition_variable condition;
    int expected, waiting = 0, generation = 0;

    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const int mine = generation;
        if (++waiting == expected) release();
        condition.wait(lock, [&] { return generation != mine; });
    }
    void drop() {  // a thread has finished
        std::unique_lock<std::mutex> lock(mutex);
        if (--expected && waiting == expected) release();
    }
    void release() {
        waiting = 0, ++generation;
        condition.notify_all();
    }
};

std::vector<Thread> threads(MOST);
Barrier block_barrier, warp_barriers[MOST / LANES];

void wait(State where, int) {
    (where == AT_BLOCK ? block_barrier : warp_barriers[self->index / LANES]).wait();
}

inline void run_block(const std::vector<int> &order) {
    std::vector<std::thread> running;
    block_barrier.expected = num_threads;
    for (Barrier &b : warp_barriers) b.expected = LANES;
    for (int i : order)
        running.emplace_back([i] {
            self = &threads[i], threadIdx.x = i;
            run_kernel(kernel_arguments);
            warp_barriers[i / LANES].drop();
            block_barrier.drop();
        });
    for (std::thread &t : running) t.join();
}

inline Thread *thread(int i) { return &threads[i]; }

#endif

inline std::vector<int> in_order(int n, std::mt19937 &random) {
    std::vector<int> order(n);
    std::iota(order.begin(), order.end(), 0);
    if (seed) std::shuffle(order.begin(), order.end(), random);
    return order;
}

inline void check_shared(size_t bytes) {
    const unsigned char *p = (const unsigned char *)shared;
    for (size_t i = bytes; i < std::min(bytes + 4096, sizeof shared); ++i)
        if (p[i] != 0xff) return fail("shared memory written beyond its end");
}

inline cudaError_t run_grid(const cudaLaunchConfig_t &config) {
    gridDim = config.gridDim, blockDim = config.blockDim;
    num_threads = blockDim.x;
    if (num_threads % LANES || num_threads > MOST || config.dynamicSmemBytes > SHARED_BYTES)
        return cudaErrorInvalidValue;
    std::mt19937 random(seed);
    error.clear();
    for (int i : in_order(gridDim.x * gridDim.y * gridDim.z, random)) {
        memset((void *)shared, 0xff, sizeof shared);  // NaN in all three types
        blockIdx = dim3(i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y);
        for (int t = 0; t < num_threads; ++t) *thread(t) = {t, READY, 0};
        run_block(in_order(num_threads, random));
        check_shared(config.dynamicSmemBytes);
        if (!error.empty()) return cudaErrorUnknown;
    }
    return cudaSuccess;
}

}  // namespace emulation

#define __syncthreads() emulation::wait(emulation::AT_BLOCK, __LINE__)
#define __syncwarp() emulation::wait(emulation::AT_WARP, __LINE__)
#define __shfl_xor_sync(mask, x, lane_mask) emulation::shuffle_xor(mask, x, lane_mask, __LINE__)
#define mma(...) emulation::mma(__LINE__, __VA_ARGS__)

template <typename Argument>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Argument),
                               const Argument &argument) {
    struct Call {
        void (*kernel)(Argument);
        Argument argument;
    } call = {kernel, argument};
    emulation::kernel_arguments = &call;
    emulation::run_kernel = [](void *p) { ((Call *)p)->kernel(((Call *)p)->argument); };
    return emulation::run_grid(*config);
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, size_t bytes) {
    return bytes > SHARED_BYTES ? cudaErrorInvalidValue : cudaSuccess;
}

inline cudaError_t cudaFree(void *) { return cudaSuccess; }

inline const char *cudaGetErrorString(cudaError_t) {
    return emulation::error.empty() ? "invalid argument" : emulation::error.c_str();
}

extern "C" void emulation_shuffle(int seed) { emulation::seed = seed; }
