// Norm, rotate, append to the rolling cache, attend: kv_cache.cache_append_attention on a GPU.
//
// Symbols (kv_cache.py, FlashAttention): B clips, Q queries, T new keys, H heads, D width per head,
// N slots of the cache; S scores, P softmax weights, m running maximum, l running sum, O output.
//
// In PyTorch this is a chain of about a dozen small kernels, each of which reads and writes whole
// tensors, or waits to be launched. Three rungs lead from there to here:
//
//   1. One pass over memory (`append`). RMSNorm needs a sum over a whole row (H*D), then every
//      channel is scaled and turned once. A block takes one row, a thread a few pairs of channels:
//      each is read once, kept in registers during the sum, and written to its final place: the
//      queries for SDPA, the keys and values into their slots. No copy of the cache is made.
//   2. Online softmax (`fused`). Attention need not hold all scores. Walk along the keys in tiles
//      and keep a running maximum m and sum l; when m grows, rescale what was gathered before:
//          S = q k^T / sqrt(D)    m' = max(m, max S)    P = exp(S - m')
//          l = l exp(m - m') + sum P        O = O exp(m - m') + P v        result O / l
//   3. Warps share the keys (`fused`). A second of audio has 25 queries: too few to fill a GPU. So
//      a block takes 8 queries of one head, and its 8 warps take different tiles of keys; each has
//      its own (m, l, O), and the same formula merges them at the end. Every key and value is read
//      by one warp of a block and serves 8 queries.
//
// `append` is followed by PyTorch's SDPA over the slots in place: with 1152 video queries attention
// is bound by matrix multiplication, where its kernels are near the limit. `fused` is for few
// queries, where launches are all the cost: it does everything in one.
//
// V2A, 25 audio queries over 1152 new video keys, goes by `append` today. `fused` could do it: in
// bfloat16 its block would hold 170 KB of the 227 KB of shared memory that an H100 has for it. But
// each of the 128 blocks would norm all the new keys for itself, whole rows of them. Which way is
// faster is not measured on a GPU yet.
//
// Blocks of one launch run in any order. So no block of `fused` reads a slot that this launch
// writes: each makes the new keys from the raw input itself, and skips their slots.
//
// Floors on an H100, computed for 800 TFLOP/s and 3 TB/s (bfloat16, benchmarks/bench_attention.py):
// `append` for 1152 x 4096 moves 57 MB, 19 us; attention of 1152 queries over 7296 keys (window 5
// s) multiplies for 172 us; audio, 25 queries over 417 keys (15 s), moves 3.8 MB, 1.3 us. Not
// measured on a GPU yet.
//
// The interface is plain C, called through ctypes by kernel/cache_append_attention.py, which checks all
// arguments. Compiling without PyTorch's headers takes seconds, and any PyTorch can use the result.
// Sources: Dao et al., FlashAttention (2022) and Flash-Decoding (2023); Milakov and Gimelshein,
// Online normalizer calculation for softmax (2018); CUDA C++ Programming Guide.

#ifdef __CUDACC__  // tests compile this file with g++ and include tests/emulation.h instead
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

struct Rows {  // (B, tokens, H*D): whole rows, which may lie apart
    const void *x;
    long long clip, token;  // elements from one clip to the next, from one token to the next
};

struct Raw {  // queries or keys as they leave their projection
    Rows rows;
    const void *weight;     // (H*D) of the norm
    const void *cos, *sin;  // (turns, H*D/2)
    int tokens;
    int turns;  // rows of the tables: one per token, 1 for all tokens alike, 0 for no rotation
};

struct Args {
    Raw q, k;
    Rows v;                   // values, T as keys
    void *k_cache, *v_cache;  // (B, N, H*D)
    void *out;                // (B, Q, H*D): queries that are ready (append), attention (fused)
    int B, H, N;
    int first, filled;  // slots [first, filled) may be read once the new keys are in
    int start;          // the new keys belong in slots [start, start + T)
    int split;          // a pair is channels (i, i + D/2) of a head if 1, (2i, 2i + 1) if 0
    float eps;
};

template <typename scalar>
__device__ inline const scalar *row_of(const Rows &rows, int b, int token) {
    return (const scalar *)rows.x + b * rows.clip + token * rows.token;
}

constexpr int WARP = 32;
constexpr int WARPS = 8;  // warps of a block of `fused`; they share the keys
constexpr int ROWS = 8;   // queries of a block of `fused`; they share what is read

// ---- numbers: stored as float, half or bfloat16, computed as float ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float &to, float x) { to = x; }
__device__ inline void store(__half &to, float x) { to = __float2half(x); }
__device__ inline void store(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }

template <typename scalar>
__device__ inline float rounded(float x) {
    scalar y;
    store(y, x);
    return to_float(y);
}

constexpr int at_most_16(int bytes) { return bytes < 16 ? bytes : 16; }

template <typename scalar, int n>
struct alignas(at_most_16(n * sizeof(scalar))) Vector {  // read and written as a whole
    scalar at[n];
};

template <typename scalar, int n>
__device__ inline Vector<scalar, n> &vector_at(const scalar *p) {
    return *(Vector<scalar, n> *)p;
}

// ---- pairs of channels that turn together ----

// V: pairs a thread handles at once, so that their two halves are loads of up to 16 bytes.
template <typename scalar, int D>
__host__ __device__ constexpr int pairs_at_once() {
    int V = 16 / sizeof(scalar);
    while (D / 2 % V) V /= 2;
    return V;
}

template <int V>
struct Pairs {
    float a[V], b[V];
};

// Pairs [u V, (u + 1) V) of the D channels of one head.
template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline Pairs<V> load_pairs(const scalar *head, int u, bool split) {
    auto one = vector_at<scalar, V>(head + (split ? u * V : 2 * u * V));
    auto two = vector_at<scalar, V>(head + (split ? u * V + D / 2 : 2 * u * V + V));
    Pairs<V> x;
#pragma unroll
    for (int j = 0; j < V; ++j) {  // interleaved: channels 2 j and 2 j + 1 of both loads in a row
        const int i = 2 * j % V;
        x.a[j] = to_float(split ? one.at[j] : 2 * j < V ? one.at[i] : two.at[i]);
        x.b[j] = to_float(split ? two.at[j] : 2 * j < V ? one.at[i + 1] : two.at[i + 1]);
    }
    return x;
}

template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline void store_pairs(scalar *head, int u, bool split, const Pairs<V> &x) {
    Vector<scalar, V> one, two;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const int i = j / 2, k = (V + j) / 2;
        store(one.at[j], split ? x.a[j] : j % 2 ? x.b[i] : x.a[i]);
        store(two.at[j], split ? x.b[j] : j % 2 ? x.b[k] : x.a[k]);
    }
    vector_at<scalar, V>(head + (split ? u * V : 2 * u * V)) = one;
    vector_at<scalar, V>(head + (split ? u * V + D / 2 : 2 * u * V + V)) = two;
}

// x * inverse_rms * weight, turned by the token's angle; token counts within its clip.
template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline Pairs<V> norm_and_rotate(Pairs<V> x, const Raw &raw, int token, int H, int h,
                                           int u, float inverse_rms, bool split) {
    Pairs<V> w = load_pairs<scalar, D>((const scalar *)raw.weight + h * D, u, split);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        x.a[j] *= inverse_rms * w.a[j];
        x.b[j] *= inverse_rms * w.b[j];
    }
    if (raw.turns == 0) return x;
    const int row = raw.turns == 1 ? 0 : token;
    const int at = (row * H + h) * (D / 2) + u * V;  // the tables are (turns, H, D/2)
    auto cos = vector_at<scalar, V>((const scalar *)raw.cos + at);
    auto sin = vector_at<scalar, V>((const scalar *)raw.sin + at);
    Pairs<V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float c = to_float(cos.at[j]), s = to_float(sin.at[j]);
        y.a[j] = x.a[j] * c - x.b[j] * s;
        y.b[j] = x.b[j] * c + x.a[j] * s;
    }
    return y;
}

// ---- sums ----

__device__ inline float warp_sum(float x) {
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// 1 / sqrt(mean x^2 + eps) of a whole row, by one warp.
template <typename scalar>
__device__ inline float inverse_rms(const scalar *row, int width, float eps) {
    constexpr int n = 16 / sizeof(scalar);
    float sum = 0;
    for (int i = threadIdx.x % WARP * n; i < width; i += WARP * n) {
        auto x = vector_at<scalar, n>(row + i);
#pragma unroll
        for (int j = 0; j < n; ++j) sum += to_float(x.at[j]) * to_float(x.at[j]);
    }
    return rsqrtf(warp_sum(sum) / width + eps);
}

// ---- rung 1: one pass over memory ----

// Grid (max(Q, T), B, 3): a block per row of q, k and v.  A thread has V pairs of channels.
template <typename scalar, int D>
__global__ void append(const __grid_constant__ Args a) {
    constexpr int V = pairs_at_once<scalar, D>(), UNITS = D / 2 / V;  // units of V pairs in a head
    extern __shared__ float4 shared[];
    float *partial = (float *)shared;  // (warps) sums of squares
    const int token = blockIdx.x, which = blockIdx.z;
    const int h = threadIdx.x / UNITS, u = threadIdx.x % UNITS;
    const bool split = a.split, busy = h < a.H;  // the last warp may have threads to spare
    const Raw &raw = which == 0 ? a.q : a.k;
    if (token >= raw.tokens) return;
    const size_t width = a.H * D, row = (size_t)blockIdx.y * raw.tokens + token;
    const size_t slot = (size_t)blockIdx.y * a.N + a.start + token;

    const scalar *from = row_of<scalar>(which == 2 ? a.v : raw.rows, blockIdx.y, token) + h * D;
    scalar *to = which == 0   ? (scalar *)a.out + row * width
                 : which == 1 ? (scalar *)a.k_cache + slot * width
                              : (scalar *)a.v_cache + slot * width;
    Pairs<V> x = {};
    if (busy) x = load_pairs<scalar, D>(from, u, split);
    if (which != 2) {  // values are kept as they are
        float sum = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) sum += x.a[j] * x.a[j] + x.b[j] * x.b[j];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < blockDim.x / WARP; ++w) sum += partial[w];
        const float scale = rsqrtf(sum / width + a.eps);
        if (busy) x = norm_and_rotate<scalar, D>(x, raw, token, a.H, h, u, scale, split);
    }
    if (busy) store_pairs<scalar, D>(to + h * D, u, split, x);
}

// ---- rungs 2 and 3: online softmax, keys shared among warps ----

// A block of `fused`: its part of the work, its shared memory, its steps.
template <typename scalar, int D>
struct Block {
    static constexpr int V = pairs_at_once<scalar, D>(), UNITS = D / 2 / V;
    static constexpr int C = (D + WARP - 1) / WARP;  // a lane has channels [lane C, lane C + C)

    const Args &a;
    const int b = blockIdx.z, h = blockIdx.y, first_row = blockIdx.x * ROWS;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int Q = a.q.tokens, T = a.k.tokens, width = a.H * D;
    const int num_old = a.filled - a.first - T, num_keys = num_old + T;
    // In shared memory:
    float *const q;            // (ROWS, D) in pairs, units of (2, V); scaled for exp2
    float *const P;            // (WARPS, WARP, ROWS) softmax weights of each warp's tile
    float *const O;            // (WARPS, ROWS, D) for the merge, as the next two
    float *const m, *const l;  // (WARPS, ROWS)
    scalar *const new_k;       // (T, D)

    __device__ Block(const Args &a, float4 *shared)
        : a(a), q((float *)shared), P(q + ROWS * D), O(P + WARPS * WARP * ROWS),
          m(O + WARPS * ROWS * D), l(m + WARPS * ROWS), new_k((scalar *)(l + WARPS * ROWS)) {}

    static size_t shared_bytes(int T) {
        const size_t floats = ROWS * D + WARPS * WARP * ROWS + WARPS * ROWS * (D + 2);
        return floats * sizeof(float) + (size_t)T * D * sizeof(scalar);
    }

    // This head's part of a row of x (B, tokens, H*D).
    __device__ scalar *head_of(const void *x, int tokens, int token) const {
        return (scalar *)x + ((size_t)b * tokens + token) * width + h * D;
    }
    __device__ const scalar *head_of(const Rows &rows, int token) const {
        return row_of<scalar>(rows, b, token) + h * D;
    }

    // Key j: the old ones first, stepping over the slots of the new ones; then the new ones.
    __device__ int slot_of(int j) const {
        return a.first + j < a.start ? a.first + j : a.first + j + T;
    }
    __device__ const scalar *key(int j) const {
        return j < num_old ? head_of(a.k_cache, a.N, slot_of(j)) : new_k + (j - num_old) * D;
    }
    __device__ const scalar *value(int j) const {
        return j < num_old ? head_of(a.v_cache, a.N, slot_of(j)) : head_of(a.v, j - num_old);
    }

    // One warp: this head of a token, normed (over all heads) and rotated; use(u, pairs) takes it.
    template <typename Use>
    __device__ void prepare(const Raw &raw, int token, Use use) const {
        const scalar *head = head_of(raw.rows, token);
        const float scale = inverse_rms(head - h * D, width, a.eps);
        for (int u = lane; u < UNITS; u += WARP) {
            Pairs<V> x = load_pairs<scalar, D>(head, u, a.split);
            use(u, norm_and_rotate<scalar, D>(x, raw, token, a.H, h, u, scale, a.split));
        }
    }

    // Rounded as PyTorch would store them. A row beyond Q takes part as zeros and is not written.
    __device__ void prepare_queries() const {
        const float scale = 1.44269504f / sqrtf(D);  // log2(e) / sqrt(D), for exp2
        for (int r = warp; r < ROWS; r += WARPS) {
            float *row = q + r * D;
            if (first_row + r >= Q) {
                for (int i = lane; i < D; i += WARP) row[i] = 0;
                continue;
            }
            prepare(a.q, first_row + r, [&](int u, const Pairs<V> &x) {
                for (int j = 0; j < V; ++j) {
                    row[u * 2 * V + j] = rounded<scalar>(x.a[j]) * scale;
                    row[u * 2 * V + V + j] = rounded<scalar>(x.b[j]) * scale;
                }
            });
        }
    }

    // Every block makes them for itself: it cannot wait for another block.
    __device__ void prepare_new_keys() const {
        for (int t = warp; t < T; t += WARPS)
            prepare(a.k, t, [&](int u, const Pairs<V> &x) {
                store_pairs<scalar, D>(new_k + t * D, u, a.split, x);
            });
    }

    // The blocks of a head share the work. Nobody in this launch reads these slots.
    __device__ void append_new() const {
        constexpr int n = 16 / sizeof(scalar);
        const int threads = WARPS * WARP;
        for (int i = blockIdx.x * threads + threadIdx.x; i < T * D / n; i += gridDim.x * threads) {
            const int t = i * n / D, c = i * n % D;
            scalar *k = head_of(a.k_cache, a.N, a.start + t) + c;
            scalar *v = head_of(a.v_cache, a.N, a.start + t) + c;
            vector_at<scalar, n>(k) = vector_at<scalar, n>(new_k + i * n);
            vector_at<scalar, n>(v) = vector_at<scalar, n>(head_of(a.v, t) + c);
        }
    }

    // S = q k^T for one key, the lane's own.
    __device__ void scores(const scalar *k, float (&S)[ROWS]) const {
#pragma unroll
        for (int u = 0; u < UNITS; ++u) {
            const Pairs<V> x = load_pairs<scalar, D>(k, u, a.split);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                auto qa = vector_at<float, V>(q + r * D + u * 2 * V);
                auto qb = vector_at<float, V>(q + r * D + u * 2 * V + V);
#pragma unroll
                for (int j = 0; j < V; ++j) S[r] += qa.at[j] * x.a[j] + qb.at[j] * x.b[j];
            }
        }
    }

    // What a warp has gathered so far; l as a sum per lane, O as C channels per lane.
    struct Running {
        float m[ROWS], l[ROWS], O[ROWS][C];
    };

    // New maximum, rescale, and P for one key: the lane's own.
    __device__ Vector<float, ROWS> softmax(const float (&S)[ROWS], Running &run) const {
        Vector<float, ROWS> p;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float m_new = fmaxf(run.m[r], warp_max(S[r])), shrink = exp2f(run.m[r] - m_new);
            p.at[r] = exp2f(S[r] - m_new);
            run.l[r] = run.l[r] * shrink + p.at[r];
            run.m[r] = m_new;
#pragma unroll
            for (int c = 0; c < C; ++c) run.O[r][c] *= shrink;
        }
        return p;
    }

    // O += P v for all keys of a tile; the lane's own channels.
    __device__ void gather(int tile, Running &run) const {
        if (lane * C >= D) return;  // fewer than 32 channels
        const int count = num_keys - tile < WARP ? num_keys - tile : WARP;
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            auto v = vector_at<scalar, C>(value(tile + j) + lane * C);
            auto p = vector_at<float, ROWS>(P + (warp * WARP + j) * ROWS);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int c = 0; c < C; ++c) run.O[r][c] += p.at[r] * to_float(v.at[c]);
        }
    }

    __device__ void attend(Running &run) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) run.m[r] = -INFINITY;
        for (int tile = warp * WARP; tile < num_keys; tile += WARPS * WARP) {
            const bool valid = tile + lane < num_keys;
            float S[ROWS] = {};
            scores(key(valid ? tile + lane : tile), S);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) S[r] = valid ? S[r] : -INFINITY;
            vector_at<float, ROWS>(P + (warp * WARP + lane) * ROWS) = softmax(S, run);
            __syncwarp();  // from lanes with a key each to lanes with channels each
            gather(tile, run);
            __syncwarp();  // P is about to be overwritten
        }
    }

    __device__ void leave_for_merge(const Running &run) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float sum = warp_sum(run.l[r]);
            const int row = warp * ROWS + r;
            if (lane == 0) m[row] = run.m[r], l[row] = sum;
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (lane * C < D) O[row * D + lane * C + c] = run.O[r][c];
        }
    }

    // A warp that had no tile has m = -inf, and weighs nothing.
    __device__ void merge() const {
        for (int i = threadIdx.x; i < ROWS * D; i += WARPS * WARP) {
            const int r = i / D, c = i % D;
            if (first_row + r >= Q) return;
            float top = -INFINITY, sum = 0, out = 0;
            for (int w = 0; w < WARPS; ++w) top = fmaxf(top, m[w * ROWS + r]);
            for (int w = 0; w < WARPS; ++w) {
                const float weight = exp2f(m[w * ROWS + r] - top);
                sum += weight * l[w * ROWS + r];
                out += weight * O[(w * ROWS + r) * D + c];
            }
            store(head_of(a.out, Q, first_row + r)[c], out / sum);
        }
    }
};

// Grid (ceil(Q / ROWS), H, B): a block per 8 queries of one head.
template <typename scalar, int D>
__global__ void __launch_bounds__(WARPS *WARP, 1) fused(const __grid_constant__ Args a) {
    extern __shared__ float4 shared[];
    const Block<scalar, D> block(a, shared);
    block.prepare_queries();
    block.prepare_new_keys();
    __syncthreads();
    block.append_new();
    typename Block<scalar, D>::Running run = {};
    block.attend(run);
    block.leave_for_merge(run);
    __syncthreads();
    block.merge();
}

// ---- launch ----

template <typename scalar, int D>
cudaError_t launch(bool whole, const Args &a, cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    config.stream = stream;
    if (!whole) {
        const int threads = a.H * (D / 2 / pairs_at_once<scalar, D>());
        const int tokens = a.q.tokens > a.k.tokens ? a.q.tokens : a.k.tokens;
        config.blockDim = dim3((threads + WARP - 1) / WARP * WARP);
        config.gridDim = dim3(tokens, a.B, 3);
        config.dynamicSmemBytes = WARP * sizeof(float);  // at most 32 warps
        return cudaLaunchKernelEx(&config, append<scalar, D>, a);
    }
    config.blockDim = dim3(WARPS * WARP);
    config.gridDim = dim3((a.q.tokens + ROWS - 1) / ROWS, a.H, a.B);
    config.dynamicSmemBytes = Block<scalar, D>::shared_bytes(a.k.tokens);
    // More than 48 KB must be asked for; more than the GPU has is refused here.
    cudaError_t error = cudaFuncSetAttribute(
        fused<scalar, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
    return error ? error : cudaLaunchKernelEx(&config, fused<scalar, D>, a);
}

#ifndef HEAD_SIZES  // of the toy's audio and video, and of the full size's
#define HEAD_SIZES(X) X(24) X(40) X(64) X(128)
#endif

template <typename scalar>
cudaError_t launch_for(int D, bool whole, const Args &a, cudaStream_t stream) {
#define CASE(size) \
    if (D == size) return launch<scalar, size>(whole, a, stream);
    HEAD_SIZES(CASE)
#undef CASE
    return cudaErrorInvalidValue;
}

// dtype 0 float, 1 half, 2 bfloat16; whole: attend too, in the same kernel.  -> a CUDA error code
extern "C" int cache_append_attention(int dtype, int D, int whole, const Args *a, void *stream) {
    cudaStream_t on = (cudaStream_t)stream;
    if (dtype == 0) return launch_for<float>(D, whole, *a, on);
    if (dtype == 1) return launch_for<__half>(D, whole, *a, on);
    if (dtype == 2) return launch_for<__nv_bfloat16>(D, whole, *a, on);
    return cudaErrorInvalidValue;
}

// The first call of all: an error here says, for instance, that the compiler is newer than the driver.
extern "C" int cache_append_ready() { return cudaFree(nullptr); }

extern "C" int cache_append_args_size() { return sizeof(Args); }

extern "C" const char *cache_append_error(int code) {
    return cudaGetErrorString((cudaError_t)code);
}
