// Norm, rotate, append to the rolling cache, attend: kv_cache.cache_append_attention on a GPU.
//
// Symbols (kv_cache.py, FlashAttention): B clips, Q queries, T new keys, H heads, D width per head;
// S scores, P softmax weights, m running maximum, l running sum, O output. A "thread block" is a
// group of CUDA threads; a "block" of kv_cache.py, one second of video, does not occur here.
//
// Four rungs of a ladder. Each does the same; benchmarks/bench_attention.py times each of them.
//
//   1. PyTorch: a chain of about a dozen small kernels, then SDPA. Each kernel reads and writes
//      whole tensors, or waits to be launched.
//   2. One pass over memory (`append`), then SDPA. RMSNorm needs a sum over a whole row (H*D). Then
//      every channel is scaled and rotated once. A thread block handles one row, a thread a few
//      channel pairs. Each value is read once, kept in registers during the sum, and written once,
//      to its final place: queries to a buffer, keys and values into their slots. The cache is
//      never copied, and SDPA reads the slots in place.
//   3. `append`, then online softmax (`online`). Attention does not need all scores at once. Walk
//      along the keys in tiles and keep a running maximum m and sum l. When m grows, rescale:
//          S = q k^T / sqrt(D)    m' = max(m, max S)    P = exp(S - m')
//          l = l exp(m - m') + sum P        O = O exp(m - m') + P v        result O / l
//      A second of audio has 25 queries: too few to fill a GPU. So the warps of a thread block take
//      different tiles of keys. Each warp has its own (m, l, O), and the same formula merges them.
//      Products run on ordinary cores, and a loaded key serves only 8 queries.
//   4. `append`, then the same on tensor cores (`tensor_cores`, `combine`). One instruction of a
//      warp multiplies two small matrices, so a loaded key serves all 32 queries of a thread block
//      and is read from memory once. To keep all of the GPU reading, the keys of a head are also
//      split among thread blocks; a last small kernel merges their (m, l, O).
//
// Rung 2 is for many queries: the time of 1152 video queries goes into products, and SDPA's kernels
// are faster there. Rung 4 is for few queries in bfloat16: their time goes into reading keys and
// values. Rung 3 is there to be read; it is not chosen by default.
//
// Why `append` is a launch of its own: thread blocks of one launch run in any order, so none may
// read a slot that the same launch writes. An earlier kernel did everything in one launch, but each
// thread block had to norm all new keys again. In a CUDA graph it was slower everywhere (below).
//
// Measured on one NVIDIA H100 (torch 2.11.0+cu130, 2026-11-26, bfloat16, one clip, CUDA graphs), in
// microseconds; floors for 781 TFLOP/s and 3.0 TB/s (benchmarks/bench_attention.py):
//
//                                    floor   rung 1   rung 2   rung 3   rung 4
//   audio self, 25 queries,   5 s      0.6       60     12.3     13.5     10.0
//                            15 s      1.3       63     14.8     20.6     12.7
//   V2A, 25 queries,          5 s       23      136       75      218     40.4
//                            15 s       55      229      169      522     73.2
//   A2V, 1152 queries,        5 s      3.7       81     22.2      159        -
//                            15 s      5.0       88     29.4      295        -
//
// V2A at 5 s: `append` moves 19 MB in 8. Attention itself takes 65 in rung 2, where SDPA chooses a
// kernel of cuDNN (its flash kernels: 26 + 5), and 28 + 3 in rung 4 (`tensor_cores`, `combine`).
// Rung 3 loses to rung 2, because it does not use the tensor cores. The earlier kernel needed 19.9
// for audio self and 735 for V2A.
//
// The interface is plain C, called through ctypes by kernel/library.py, which checks all arguments.
// Compiling without PyTorch's headers takes seconds, and any PyTorch can use the result. Sources:
// Dao et al., FlashAttention (2022) and Flash-Decoding (2023); Milakov and Gimelshein, Online
// normalizer calculation for softmax (2018); CUDA C++ Programming Guide.

#ifdef __CUDACC__  // else: tests compile this file with g++ and tests/emulation.h
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

struct StridedRows {  // (B, tokens, H*D); rows are contiguous, but may lie apart
    const void *x;
    long long clip, token;  // elements from one clip to the next, from one token to the next
};

struct Projection {  // queries or keys, before norm and rotation
    StridedRows rows;
    const void *weight;     // (H*D) of the norm
    const void *cos, *sin;  // (rope_rows, H*D/2)
    int tokens;
    int rope_rows;  // `tokens`, or 1: the same angles for all tokens, or 0: no rotation
};

struct Args {  // the same fields in the same order as Args in library.py
    Projection q, k;
    StridedRows v;            // values, T tokens like the keys
    void *k_cache, *v_cache;  // (B, slots, H*D)
    void *out;                // (B, Q, H*D): `append`: queries; after it: attention
    float *parts;             // (splits, B*Q*H, D + 4) of `tensor_cores`, see `merge`
    int B, H, slots, splits;
    int first, filled;  // slots [first, filled) are visible, including the new keys
    int start;          // the new keys belong in slots [start, start + T)
    int split;          // a pair is channels (i, i + D/2) of a head if 1, (2i, 2i + 1) if 0
    float eps;
};

template <typename scalar>
__device__ inline const scalar *row_of(const StridedRows &rows, int b, int token) {
    return (const scalar *)rows.x + b * rows.clip + token * rows.token;
}

constexpr int WARP = 32;

// ---- numbers: stored as float, half or bfloat16, computed as float ----

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float &to, float x) { to = x; }
__device__ inline void store(__half &to, float x) { to = __float2half(x); }
__device__ inline void store(__nv_bfloat16 &to, float x) { to = __float2bfloat16(x); }

constexpr int at_most_16(int bytes) { return bytes < 16 ? bytes : 16; }

template <typename scalar, int n>
struct alignas(at_most_16(n * sizeof(scalar))) Vector {  // one load or store
    scalar at[n];
};

template <typename scalar, int n>
__device__ inline Vector<scalar, n> &vector_at(const scalar *p) {
    return *(Vector<scalar, n> *)p;
}

// ---- pairs of channels that are rotated together ----

// Pairs that a thread handles at once, V: both halves are then loads of up to 16 bytes.
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
    for (int j = 0; j < V; ++j) {  // interleaved: channels 2j and 2j + 1 of `one`, then of `two`
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

// x * inverse_rms * weight, rotated by the angles of the token (counted within its clip).
template <typename scalar, int D, int V = pairs_at_once<scalar, D>()>
__device__ inline Pairs<V> norm_and_rotate(Pairs<V> x, const Projection &p, int token, int H, int h,
                                           int u, float inverse_rms, bool split) {
    Pairs<V> w = load_pairs<scalar, D>((const scalar *)p.weight + h * D, u, split);
#pragma unroll
    for (int j = 0; j < V; ++j) {
        x.a[j] *= inverse_rms * w.a[j];
        x.b[j] *= inverse_rms * w.b[j];
    }
    if (p.rope_rows == 0) return x;
    const int row = p.rope_rows == 1 ? 0 : token;
    const int at = (row * H + h) * (D / 2) + u * V;  // the tables are (rope_rows, H, D/2)
    auto cos = vector_at<scalar, V>((const scalar *)p.cos + at);
    auto sin = vector_at<scalar, V>((const scalar *)p.sin + at);
    Pairs<V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
        const float c = to_float(cos.at[j]), s = to_float(sin.at[j]);
        y.a[j] = x.a[j] * c - x.b[j] * s;
        y.b[j] = x.b[j] * c + x.a[j] * s;
    }
    return y;
}

// ---- sums and maxima over groups of neighbouring lanes ----

template <int lanes = WARP>
__device__ inline float warp_sum(float x) {
    for (int step = lanes / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

template <int lanes = WARP>
__device__ inline float warp_max(float x) {
    for (int step = lanes / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// ---- rung 2: one pass over memory ----

// Grid (max(Q, T), B, 3): one thread block per row of q, k and v. A thread has V channel pairs.
template <typename scalar, int D>
__global__ void append(const __grid_constant__ Args a) {
    constexpr int V = pairs_at_once<scalar, D>(), UNITS = D / 2 / V;  // units of V pairs in a head
    extern __shared__ float4 shared[];
    float *partial = (float *)shared;  // (warps) sums of squares
    const int token = blockIdx.x, which = blockIdx.z;  // 0: q, 1: k, 2: v
    const int h = threadIdx.x / UNITS, u = threadIdx.x % UNITS;
    const bool split = a.split, has_pairs = h < a.H;  // false: spare threads of the last warp
    const Projection &p = which == 0 ? a.q : a.k;
    if (token >= p.tokens) return;  // Q and T may differ
    const size_t width = a.H * D, row = (size_t)blockIdx.y * p.tokens + token;
    const size_t slot = (size_t)blockIdx.y * a.slots + a.start + token;

    const scalar *from = row_of<scalar>(which == 2 ? a.v : p.rows, blockIdx.y, token) + h * D;
    scalar *to = which == 0   ? (scalar *)a.out + row * width
                 : which == 1 ? (scalar *)a.k_cache + slot * width
                              : (scalar *)a.v_cache + slot * width;
    Pairs<V> x = {};
    if (has_pairs) x = load_pairs<scalar, D>(from, u, split);
    if (which != 2) {  // values are copied unchanged
        float sum = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) sum += x.a[j] * x.a[j] + x.b[j] * x.b[j];
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < blockDim.x / WARP; ++w) sum += partial[w];
        const float scale = rsqrtf(sum / width + a.eps);
        if (has_pairs) x = norm_and_rotate<scalar, D>(x, p, token, a.H, h, u, scale, split);
    }
    if (has_pairs) store_pairs<scalar, D>(to + h * D, u, split, x);
}

// ---- rungs 3 and 4: the head of a thread block, parts of its softmax ----

// The head of one thread block. `append` has run: every visible key and value is in its slot.
template <typename scalar, int D>
struct Head {
    const Args &a;
    const int h = blockIdx.y, b = blockIdx.z, Q = a.q.tokens, num_keys = a.filled - a.first;

    __device__ scalar *at(const void *x, int tokens, int token) const {  // x (B, tokens, H, D)
        return (scalar *)x + (((size_t)b * tokens + token) * a.H + h) * D;
    }
    // Normed and rotated; the thread block overwrites it with the result.
    __device__ scalar *query(int r) const { return at(a.out, Q, r); }
    __device__ const scalar *key(int j) const { return at(a.k_cache, a.slots, slot(j)); }
    __device__ const scalar *value(int j) const { return at(a.v_cache, a.slots, slot(j)); }
    __device__ int slot(int j) const {  // of visible key j; past the last one, the last one's
        return a.first + (j < num_keys ? j : num_keys - 1);
    }
};

constexpr float SCALE = 1.44269504f;  // log2(e): exp(x) = exp2(SCALE x)

// A part is the result for some of the keys: D + 4 floats (O, m, l, two spare ones, so that rows
// start in different banks of shared memory). A part without keys has m = -inf: its weight is 0.
struct Merged {
    float m, l, O;
};

// Channel c of one row of parts (count, rows, D + 4).
template <int D>
__device__ inline Merged merge(const float *parts, int count, int rows, int row, int c) {
    Merged all = {-INFINITY, 0, 0};
    parts += row * (D + 4);
    for (int i = 0; i < count; ++i) all.m = fmaxf(all.m, parts[i * rows * (D + 4) + D]);
    for (int i = 0; i < count; ++i) {
        const float *part = parts + i * rows * (D + 4), weight = exp2f(part[D] - all.m);
        all.l += weight * part[D + 1];
        all.O += weight * part[c];
    }
    return all;
}

// ---- rung 3: online softmax, keys split among warps ----

// One thread block of `online`: 8 queries of a head, which reuse each loaded key and value.
template <typename scalar, int D>
struct OnlineBlock {
    static constexpr int WARPS = 8, QUERIES = 8, N = 16 / sizeof(scalar);
    static constexpr int C = (D + WARP - 1) / WARP;  // a lane has channels [lane C, lane C + C)
    static constexpr int FLOATS = QUERIES * D + WARPS * WARP * QUERIES + WARPS * QUERIES * (D + 4);

    const Head<scalar, D> head;
    const int first_query = blockIdx.x * QUERIES;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // In shared memory:
    float *const q;      // (QUERIES, D), scaled for exp2
    float *const P;      // (WARPS, WARP, QUERIES) softmax weights of each warp's tile
    float *const parts;  // (WARPS, QUERIES, D + 4), see `merge`

    __device__ OnlineBlock(const Args &a, float *shared)
        : head{a}, q(shared), P(q + QUERIES * D), parts(P + WARPS * WARP * QUERIES) {}

    __device__ void load_queries() const {  // zeros beyond the last one; their result is dropped
        for (int i = threadIdx.x; i < QUERIES * D; i += WARPS * WARP) {
            const int r = first_query + i / D;
            q[i] = r < head.Q ? to_float(head.query(r)[i % D]) * (SCALE / sqrtf(D)) : 0;
        }
    }

    // S = q k^T for one key; every lane has its own key.
    __device__ void scores(const scalar *k, float (&S)[QUERIES]) const {
#pragma unroll
        for (int u = 0; u < D; u += N) {
            auto x = vector_at<scalar, N>(k + u);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r) {
                auto y = vector_at<float, N>(q + r * D + u);
#pragma unroll
                for (int j = 0; j < N; ++j) S[r] += y.at[j] * to_float(x.at[j]);
            }
        }
    }

    // A warp's result so far: m for the warp, l as one sum per lane, O as C channels per lane.
    struct Running {
        float m[QUERIES], l[QUERIES], O[QUERIES][C];
    };

    // New maximum; rescale; P for the key of this lane.
    __device__ Vector<float, QUERIES> softmax(const float (&S)[QUERIES], Running &run) const {
        Vector<float, QUERIES> p;
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) {
            const float m_new = fmaxf(run.m[r], warp_max(S[r])), shrink = exp2f(run.m[r] - m_new);
            p.at[r] = exp2f(S[r] - m_new);
            run.l[r] = run.l[r] * shrink + p.at[r];
            run.m[r] = m_new;
#pragma unroll
            for (int c = 0; c < C; ++c) run.O[r][c] *= shrink;
        }
        return p;
    }

    // O += P v over all keys of a tile; every lane has its own channels.
    __device__ void add_values(int tile, Running &run) const {
        if (lane * C >= D) return;  // D < 32: this lane has no channels
        const int count = head.num_keys - tile < WARP ? head.num_keys - tile : WARP;
#pragma unroll 4
        for (int j = 0; j < count; ++j) {
            auto v = vector_at<scalar, C>(head.value(tile + j) + lane * C);
            auto p = vector_at<float, QUERIES>(P + (warp * WARP + j) * QUERIES);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r)
#pragma unroll
                for (int c = 0; c < C; ++c) run.O[r][c] += p.at[r] * to_float(v.at[c]);
        }
    }

    __device__ void attend(Running &run) const {
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) run.m[r] = -INFINITY;
        for (int tile = warp * WARP; tile < head.num_keys; tile += WARPS * WARP) {
            float S[QUERIES] = {};
            scores(head.key(tile + lane), S);
#pragma unroll
            for (int r = 0; r < QUERIES; ++r)
                if (tile + lane >= head.num_keys) S[r] = -INFINITY;
            vector_at<float, QUERIES>(P + (warp * WARP + lane) * QUERIES) = softmax(S, run);
            __syncwarp();  // before: a lane per key; after: a lane per C channels
            add_values(tile, run);
            __syncwarp();  // the next tile overwrites P
        }
    }

    __device__ void store_part(const Running &run) const {
#pragma unroll
        for (int r = 0; r < QUERIES; ++r) {
            const float sum = warp_sum(run.l[r]);
            float *part = parts + (warp * QUERIES + r) * (D + 4);
            if (lane == 0) part[D] = run.m[r], part[D + 1] = sum;
#pragma unroll
            for (int c = 0; c < C; ++c)
                if (lane * C < D) part[lane * C + c] = run.O[r][c];
        }
    }

    __device__ void merge_warps() const {
        for (int i = threadIdx.x; i < QUERIES * D; i += WARPS * WARP) {
            const int r = i / D, c = i % D;
            if (first_query + r >= head.Q) return;
            const Merged all = merge<D>(parts, WARPS, QUERIES, r, c);
            store(head.query(first_query + r)[c], all.O / all.l);
        }
    }
};

// Grid (ceil(Q / QUERIES), H, B): one thread block per 8 queries of one head.
template <typename scalar, int D>
__global__ void __launch_bounds__(OnlineBlock<scalar, D>::WARPS *WARP, 1)
    online(const __grid_constant__ Args a) {
    extern __shared__ float4 shared[];
    const OnlineBlock<scalar, D> block(a, (float *)shared);
    block.load_queries();
    __syncthreads();
    typename OnlineBlock<scalar, D>::Running run = {};
    block.attend(run);
    block.store_part(run);
    __syncthreads();
    block.merge_warps();
}

// ---- rung 4: tensor cores, keys split among thread blocks ----

using bf16 = __nv_bfloat16;
using Two = Vector<bf16, 2>;   // a register of the tensor cores
using Eight = Vector<Two, 4>;  // one load of 16 bytes

// C += A B, one instruction of a warp: A is (16, 16), B (16, 8), C (16, 8). Lane 4 g + t holds
//   a0, a2  columns (2t, 2t + 1) and (2t + 8, 2t + 9) of row g; a1, a3 the same of row g + 8
//   b0, b1  rows (2t, 2t + 1) and (2t + 8, 2t + 9) of column g
//   c       columns (2t, 2t + 1) of row g, then of row g + 8
#ifdef __CUDACC__
__device__ inline void mma(float (&c)[4], Two a0, Two a1, Two a2, Two a3, Two b0, Two b1) {
#if __CUDA_ARCH__ < 800
    __trap();  // older tensor cores know no bfloat16; `fits_tensor_cores` never comes here
#else
    auto bits = [](const Two &x) { return *(const unsigned *)&x; };
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(bits(a0)), "r"(bits(a1)), "r"(bits(a2)), "r"(bits(a3)), "r"(bits(b0)), "r"(bits(b1)));
#endif
}
#endif

__device__ inline Eight eight(const bf16 *p) { return *(const Eight *)p; }

__device__ inline Two two(float x, float y) {
    Two xy;
    store(xy.at[0], x), store(xy.at[1], y);
    return xy;
}

// One thread block of `tensor_cores`: all queries of a head, a range of its keys. Warps take tiles
// of 16 keys in turn. A lane loads 16 bytes at once, straight into the registers that `mma` reads.
// This works because two orders are free:
//   q k^T  A sum may run over the channels in any order. Lane 4 g + t loads channels [8t, 8t + 8)
//          of key g, and passes four of them as "2t, 2t + 1, 2t + 8, 2t + 9", then the other four.
//   P v    Columns may stand in any order. Lane 4 g + t loads 8 channels of keys 2t, 2t + 1,
//          2t + 8 and 2t + 9, and passes the c-th channel to the c-th product as "column g".
struct TensorBlock {
    static constexpr int D = 64, WARPS = 12, TILE = 16, FEW = 32;  // FEW: most queries
    static constexpr int FLOATS = WARPS * FEW * (D + 4);

    const Head<bf16, D> head;
    float *const parts;  // (WARPS, FEW, D + 4) in shared memory, see `merge`
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;

    struct Tile {
        Eight k[2][2];         // keys g and g + 8: channels [8t, 8t + 8) and 32 more
        Vector<bf16, 8> v[4];  // keys 2t, 2t + 1, 2t + 8, 2t + 9
    };
    struct Running {       // a lane has a part of queries g, g + 8, g + 16, g + 24
        Eight q[4][2];     // channels [8t, 8t + 8) and 32 more
        float m[4], l[4];  // l: sum over the keys of this lane
        float O[2][8][4];  // c of 8 products, for queries 0 to 15, then 16 to 31
    };

    __device__ void load_queries(Running &run) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bf16 *q = head.query(8 * i + g) + 8 * t;
            run.m[i] = -INFINITY;
            if (8 * i + g < head.Q) run.q[i][0] = eight(q), run.q[i][1] = eight(q + 32);
        }
    }

    // S = q k^T for 16 queries, rows g (q) and g + 8 (q8), and two times 8 keys.
    __device__ void scores(const Eight (&q)[2], const Eight (&q8)[2], const Eight (&k)[2][2],
                           float (&S)[2][4]) const {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, j = i % 2 * 2;
                mma(S[n], q[half].at[j], q8[half].at[j], q[half].at[j + 1], q8[half].at[j + 1],
                    k[n][half].at[j], k[n][half].at[j + 1]);
            }
    }

    // One query, row g (e = 0) or g + 8 (e = 2) of 16: new maximum; rescale; S becomes P.
    __device__ void softmax(float (&S)[2][4], int M, int e, Running &run) const {
        const float scale = SCALE / sqrtf(D);
        float &m = run.m[2 * M + e / 2], &l = run.l[2 * M + e / 2];
        const float top = fmaxf(fmaxf(S[0][e], S[0][e + 1]), fmaxf(S[1][e], S[1][e + 1]));
        const float m_new = fmaxf(m, warp_max<4>(top) * scale), shrink = exp2f(m - m_new);
        m = m_new, l *= shrink;
#pragma unroll
        for (int j = e; j < e + 2; ++j) {
#pragma unroll
            for (int c = 0; c < 8; ++c) run.O[M][c][j] *= shrink;
#pragma unroll
            for (int n = 0; n < 2; ++n) l += S[n][j] = exp2f(S[n][j] * scale - m);
        }
    }

    // Eight loads, all under way before the first product.
    __device__ Tile load(int first) const {
        Tile x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bf16 *k = head.key(first + i / 2 * 8 + g) + i % 2 * 32 + 8 * t;
            const bf16 *v = head.value(first + i / 2 * 8 + 2 * t + i % 2) + g % 2 * 32 + g / 2 * 8;
            x.k[i / 2][i % 2] = eight(k);
            x.v[i] = vector_at<bf16, 8>(v);
        }
        return x;
    }

    __device__ void attend_tile(int first, const Tile &x, Running &run) const {
#pragma unroll
        for (int M = 0; M < 2; ++M) {
            float S[2][4] = {};  // c of `mma`, for keys 0 to 7 and 8 to 15
            scores(run.q[2 * M], run.q[2 * M + 1], x.k, S);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (first + i / 4 * 8 + 2 * t + i % 2 >= head.num_keys) S[i / 4][i % 4] = -INFINITY;
            softmax(S, M, 0, run), softmax(S, M, 2, run);
            const Two p[4] = {two(S[0][0], S[0][1]), two(S[0][2], S[0][3]),  // c of one product
                              two(S[1][0], S[1][1]), two(S[1][2], S[1][3])};  // is a of the next
#pragma unroll
            for (int c = 0; c < 8; ++c)
                mma(run.O[M][c], p[0], p[1], p[2], p[3], Two{x.v[0].at[c], x.v[1].at[c]},
                    Two{x.v[2].at[c], x.v[3].at[c]});
        }
    }

    // Column 2t of the c-th product is channel 8t + c, column 2t + 1 is channel 32 + 8t + c.
    __device__ void store_part(const Running &run) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float l = warp_sum<4>(run.l[i]), *part = parts + (warp * FEW + 8 * i + g) * (D + 4);
            if (t == 0) part[D] = run.m[i], part[D + 1] = l;
#pragma unroll
            for (int c = 0; c < 16; ++c)
                part[c / 8 * 32 + 8 * t + c % 8] = run.O[i / 2][c % 8][i % 2 * 2 + c / 8];
        }
    }

    __device__ void merge_warps() const {
        const Args &a = head.a;
        for (int i = threadIdx.x; i < head.Q * D; i += WARPS * WARP) {
            const int r = i / D, c = i % D, rows = a.B * head.Q * a.H;
            const Merged all = merge<D>(parts, WARPS, FEW, r, c);
            bf16 &out = head.query(r)[c];
            if (a.splits == 1) {
                store(out, all.O / all.l);
                continue;
            }
            const size_t row = (&out - (bf16 *)a.out) / D;
            float *part = a.parts + (blockIdx.x * rows + row) * (D + 4);
            part[c] = all.O;
            if (c == 0) part[D] = all.m, part[D + 1] = all.l;
        }
    }
};

// Grid (splits, H, B): one thread block per range of keys and head.
__global__ void __launch_bounds__(TensorBlock::WARPS *WARP, 1)
    tensor_cores(const __grid_constant__ Args a) {
    extern __shared__ float4 shared[];
    const TensorBlock block{{a}, (float *)shared};
    TensorBlock::Running run = {};
    block.load_queries(run);
    const int tiles = (block.head.num_keys + block.TILE - 1) / block.TILE;
    const int end = tiles * (blockIdx.x + 1) / a.splits;
    for (int tile = tiles * blockIdx.x / a.splits + block.warp; tile < end; tile += block.WARPS)
        block.attend_tile(tile * block.TILE, block.load(tile * block.TILE), run);
    block.store_part(run);
    __syncthreads();
    block.merge_warps();
}

// A thread per number of the output: merge the thread blocks of `tensor_cores`.
__global__ void combine(const __grid_constant__ Args a) {
    constexpr int D = TensorBlock::D;
    const int rows = a.B * a.q.tokens * a.H, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * D) return;
    const Merged all = merge<D>(a.parts, a.splits, rows, i / D, i % D);
    store(((bf16 *)a.out)[i], all.O / all.l);
}

// ---- launch ----

template <typename Kernel>
cudaError_t run(Kernel kernel, dim3 grid, int threads, int floats, const Args &a, cudaStream_t on) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((threads + WARP - 1) / WARP * WARP);
    config.dynamicSmemBytes = floats * sizeof(float);
    config.stream = on;
    // A kernel must ask for more than 48 KB; more than the GPU has is refused here.
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             config.dynamicSmemBytes);
    return error ? error : cudaLaunchKernelEx(&config, kernel, a);
}

enum Rung { APPEND, ONLINE, TENSOR_CORES };

template <typename scalar, int D>
cudaError_t launch(int rung, const Args &a, cudaStream_t on) {
    const int Q = a.q.tokens, T = a.k.tokens, outputs = a.B * Q * a.H * D;
    const int threads = a.H * (D / 2 / pairs_at_once<scalar, D>());
    // WARP floats of shared memory: one sum for each of at most 32 warps
    cudaError_t error = run(append<scalar, D>, dim3(Q > T ? Q : T, a.B, 3), threads, WARP, a, on);
    if (error || rung == APPEND) return error;
    if (rung == ONLINE) {
        using Block = OnlineBlock<scalar, D>;
        const dim3 grid((Q + Block::QUERIES - 1) / Block::QUERIES, a.H, a.B);
        return run(online<scalar, D>, grid, Block::WARPS * WARP, Block::FLOATS, a, on);
    }
    using Block = TensorBlock;
    error = run(tensor_cores, dim3(a.splits, a.H, a.B), Block::WARPS * WARP, Block::FLOATS, a, on);
    if (error || a.splits == 1) return error;
    return run(combine, dim3((outputs + 255) / 256), 256, 0, a, on);
}

#ifndef HEAD_SIZES  // D of audio and video: toy (24, 40), full size (64, 128)
#define HEAD_SIZES(X) X(24) X(40) X(64) X(128)
#endif

template <typename scalar>
cudaError_t launch_for(int D, int rung, const Args &a, cudaStream_t stream) {
#define CASE(size) \
    if (D == size) return launch<scalar, size>(rung, a, stream);
    HEAD_SIZES(CASE)
#undef CASE
    return cudaErrorInvalidValue;
}

// dtype: 0 float, 1 half, 2 bfloat16. rung: 0 `append` alone, 1 and `online`, 2 and `tensor_cores`,
// for bfloat16, D = 64 and at most 32 queries. Returns a CUDA error.
extern "C" int cache_append_attention(int dtype, int D, int rung, const Args *a, void *stream) {
    auto on = (cudaStream_t)stream;
    if (rung == TENSOR_CORES && (dtype != 2 || D != 64)) return cudaErrorInvalidValue;
    if (dtype == 0) return launch_for<float>(D, rung, *a, on);
    if (dtype == 1) return launch_for<__half>(D, rung, *a, on);
    if (dtype == 2) return launch_for<__nv_bfloat16>(D, rung, *a, on);
    return cudaErrorInvalidValue;
}

// Call this first: it fails, for instance, if the driver is older than the compiler.
extern "C" int cache_append_ready() { return cudaFree(nullptr); }

extern "C" int cache_append_args_size() { return sizeof(Args); }

extern "C" const char *cache_append_error(int code) {
    return cudaGetErrorString((cudaError_t)code);
}
