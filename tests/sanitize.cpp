// All rungs on small shapes, a std::thread per CUDA thread, for ThreadSanitizer and ASan.
//
//     g++ -std=c++17 -g -O1 -DEMULATION_THREADS -fsanitize=thread tests/sanitize.cpp && ./a.out
//     g++ -std=c++17 -g -O1 -DEMULATION_THREADS -fsanitize=address,undefined tests/sanitize.cpp ...
//
// A program of its own, since the sanitizers must see everything from the start; buffers have
// exactly the size they need, so that ASan sees the first byte beyond. -DSOURCE=... for a planted
// bug. Exit status 1 for a CUDA error; the sanitizers have their own.

#include "emulation.h"

#ifndef HEAD_SIZES
#define HEAD_SIZES(X) X(24) X(64)
#endif
#ifndef SOURCE
#define SOURCE "../kernel/cache_append_attention.cu"
#endif
#include SOURCE

template <typename scalar>
struct Buffer {
    std::vector<scalar> values;
    explicit Buffer(int n) : values(n) {
        for (int i = 0; i < n; ++i) store(values[i], (i * 37 % 101 - 50) / 50.f);
    }
    scalar *at() { return values.data(); }
};

// A cache of `prefix` + 3 T slots in its steady state; the new keys take the middle of the ring.
template <typename scalar>
int run(int dtype, int D, int B, int H, int Q, int prefix, int T, int split) {
    const int N = prefix + 3 * T, width = H * D;
    const int apart = 2 * width;  // every other row belongs to somebody else
    Buffer<scalar> q(B * Q * apart), k(B * T * apart), v(B * T * apart), weight(width);
    Buffer<scalar> q_turn(Q * width / 2), k_turn(T * width / 2);
    Buffer<scalar> k_cache(B * N * width), v_cache(B * N * width), out(B * Q * width);
    const int splits = 2;  // ranges of keys of `tensor_cores`
    Buffer<float> parts(splits * B * Q * H * (D + 4));
    const Args args = {
        {{q.at(), Q * apart, apart}, weight.at(), q_turn.at(), q_turn.at(), Q, Q},
        {{k.at(), T * apart, apart}, weight.at(), k_turn.at(), k_turn.at(), T, T},
        {v.at(), T * apart, apart}, k_cache.at(), v_cache.at(), out.at(), parts.at(),
        B, H, N, splits, 0, N, prefix + T, split, 1e-6f,
    };
    int error = 0;
    for (int rung : {APPEND, ONLINE, TENSOR_CORES})
        if (rung != TENSOR_CORES || (dtype == 2 && D == 64))
            error |= cache_append_attention(dtype, D, rung, &args, nullptr);
    return error;
}

int main() {
    int error = 0;
    error |= run<float>(0, 24, 1, 2, 9, 5, 7, 0);
    error |= run<float>(0, 24, 1, 1, 3, 3, 130, 1);  // a second tile for some warps
    error |= run<__nv_bfloat16>(2, 24, 2, 1, 8, 1, 1, 1);
    error |= run<__half>(1, 64, 1, 1, 1, 2, 3, 0);
    error |= run<__nv_bfloat16>(2, 64, 1, 1, 25, 3, 10, 0);  // two ranges of keys
    return error != 0;
}
