/* The same rows for 4 or 8 pixels and 16 channels at a time, with the processor's multiplications. The
   integers are those of the code above, which defines them. Before the first image all weights are
   unpacked, in blocks of 16 channels:

       weights[block][row of the kernel][step][channel in the block][number in the step]

   A step reads a few numbers of each pixel, which lie side by side in the input. Where these and the
   weights have 8 bits, 4 of them ("narrow"; without VNNI only if the sums of some steps fit in 16
   bits), else numbers of 16 bits, 2 with AVX2 and 1 with NEON. */
enum { LANES = 16 }; /* channels of a block */

#define ALIGNED __attribute__((aligned(64)))
#define INLINE static inline __attribute__((always_inline))

/* A block's requantization, in the order of the sums. */
typedef struct {
    int32_t multiplier[LANES], bias[LANES], shift[LANES];
} block;

typedef struct {
    uint8_t *weights; /* of the first block; the others follow */
    block *blocks;
    uint8_t *masks;   /* of a shift: the bytes of a row that each tap reads */
    unsigned rows;    /* of the kernel */
    unsigned numbers; /* of a row of the kernel, */
    unsigned steps;   /* and steps for them */
    unsigned run;     /* steps that can be added up in 16 bits; 0: wide */
    unsigned bytes;   /* of a block's weights */
} form;

static form forms[NET_LAYERS];
static uint8_t unpacked[NET_UNPACKED + NET_MARGIN] ALIGNED;
/* Rows as sums read them, and one behind a shift. They end after what they hold, as `memory` does,
   since whole vectors are read and written. */
static uint8_t prepared[NET_WINDOW][NET_PREPARED + NET_MARGIN] ALIGNED;
static uint8_t moved[NET_PREPARED + NET_MARGIN] ALIGNED;

static unsigned smaller(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

#ifdef __AVX2__
enum { WIDE_STEP = 2 };
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define NET_AVX512
#define NET_VNNI
#elif defined(__AVXVNNI__)
#define NET_VNNI
#endif

INLINE __m256i vector(const void *x)
{
    return _mm256_loadu_si256((const __m256i *)x);
}

INLINE void put_vector(void *to, __m256i x)
{
    _mm256_storeu_si256((__m256i *)to, x);
}

INLINE int32_t four_bytes(const uint8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return word;
}

/* Returns 16 numbers as numbers of 16 bits. */
INLINE __m256i numbers(const uint8_t *from, uint8_t type)
{
    if (type == INT16)
        return vector(from);
    {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)from);
        return type == INT8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
    }
}

INLINE void widen(int16_t *to, const uint8_t *from, uint8_t type)
{
    put_vector(to, numbers(from, type));
}

#ifdef NET_AVX512
enum { PIXELS = 8, VECTOR = 64 };

typedef struct {
    __m512i all;
} sums;

static unsigned lane_of(unsigned channel)
{
    return channel;
}

INLINE __m512i long_vector(const void *x)
{
    return _mm512_loadu_si512(x);
}

INLINE sums no_sums(void)
{
    const sums s = {_mm512_setzero_si512()};
    return s;
}

/* Adds products of unsigned inputs and signed weights of 8 bits, or those of numbers of 16 bits. */
INLINE void sums_of(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                    const form *f, int narrow)
{
    unsigned r, i, p;
    for (p = 0; p < PIXELS; p++)
        s[p] = no_sums();
    for (r = 0; r < f->rows; r++) {
        const uint8_t *from[PIXELS];
        for (p = 0; p < PIXELS; p++)
            from[p] = x[r] + at[p];
        for (i = 0; i < 4 * f->steps; i += 4, w += LANES * 4) {
            const __m512i weights = long_vector(w);
            for (p = 0; p < PIXELS; p++) {
                const __m512i word = _mm512_set1_epi32(four_bytes(from[p] + i));
                s[p].all = narrow ? _mm512_dpbusd_epi32(s[p].all, word, weights)
                                  : _mm512_dpwssd_epi32(s[p].all, word, weights);
            }
        }
    }
}

INLINE void narrow_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                        const form *f)
{
    sums_of(s, x, at, w, f, 1);
}

INLINE void wide_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                      const form *f)
{
    sums_of(s, x, at, w, f, 0);
}

/* Returns 16 pairs of numbers of 16 bits. */
INLINE __m512i pairs(__m256i a, __m256i b)
{
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* Adds the products of each channel by itself, two taps at a time. */
INLINE sums each_sums(const uint8_t *const *x, unsigned at, const uint8_t *w, unsigned steps,
                      uint8_t type)
{
    sums s = no_sums();
    for (; steps != 0; steps--, x += 2, w += LANES * 4) {
        const __m512i both = pairs(numbers(x[0] + at, type), numbers(x[1] + at, type));
        s.all = _mm512_dpwssd_epi32(s.all, both, long_vector(w));
    }
    return s;
}

/* Clips 16 codes of 32 bits and stores them. */
INLINE void put_codes(uint8_t *to, const sums *s, const layer *l, uint8_t type)
{
    const __m512i low = _mm512_set1_epi32(l->low), high = _mm512_set1_epi32(l->high);
    const __m512i codes = _mm512_min_epi32(_mm512_max_epi32(s->all, low), high);
    if (type == INT32)
        _mm512_storeu_si512(to, codes);
    else if (type == INT16)
        put_vector(to, _mm512_cvtepi32_epi16(codes));
    else
        _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtepi32_epi8(codes));
}

/* Brings 16 sums to codes. */
INLINE sums finish(sums s, const block *b)
{
    s.all = _mm512_mullo_epi32(s.all, long_vector(b->multiplier));
    s.all = _mm512_add_epi32(s.all, long_vector(b->bias));
    s.all = _mm512_srav_epi32(s.all, long_vector(b->shift));
    return s;
}

/* Brings 16 sums of two numbers to codes. */
INLINE sums add(const uint8_t *a, uint8_t a_type, const uint8_t *b, uint8_t b_type, const layer *l)
{
    const __m512i both = pairs(numbers(a, a_type), numbers(b, b_type));
    const uint32_t high = (uint32_t)(int32_t)l->multiplier[1] << 16;
    const __m512i by = _mm512_set1_epi32((int32_t)(high | (uint16_t)l->multiplier[0]));
    const __m512i sum = _mm512_dpwssd_epi32(_mm512_set1_epi32(l->bias[0]), both, by);
    const sums s = {_mm512_sra_epi32(sum, _mm_cvtsi32_si128(l->shift[0]))};
    return s;
}

typedef __m512i whole;

INLINE whole no_bytes(void)
{
    return _mm512_setzero_si512();
}

/* Adds the bytes that a mask has. */
INLINE whole with_bytes(whole x, const uint8_t *bytes, const uint8_t *mask)
{
    return _mm512_or_si512(x, _mm512_and_si512(long_vector(bytes), long_vector(mask)));
}

INLINE void put_bytes(uint8_t *to, whole x)
{
    _mm512_storeu_si512(to, x);
}
#else
enum { PIXELS = 4, VECTOR = 32 };

/* Channels 0-3 and 8-11 of a block, and the others: so they are in order when packed. */
typedef struct {
    __m256i first, second;
} sums;

static unsigned lane_of(unsigned channel)
{
    return (channel & 3) | (channel & 4) << 1 | (channel & 8) >> 1;
}

INLINE __m256i spread(const uint8_t *x)
{
    return _mm256_set1_epi32(four_bytes(x));
}

INLINE sums no_sums(void)
{
    const sums s = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    return s;
}

#ifdef NET_VNNI
/* Adds products of unsigned inputs and signed weights of 8 bits. */
INLINE void narrow_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                        const form *f)
{
    unsigned r, i, p;
    for (p = 0; p < PIXELS; p++)
        s[p] = no_sums();
    for (r = 0; r < f->rows; r++) {
        const uint8_t *x0 = x[r] + at[0], *x1 = x[r] + at[1];
        const uint8_t *x2 = x[r] + at[2], *x3 = x[r] + at[3];
        for (i = 0; i < f->steps; i++, w += LANES * 4, x0 += 4, x1 += 4, x2 += 4, x3 += 4) {
            const __m256i w0 = vector(w), w1 = vector(w + 32);
            const __m256i bytes[PIXELS] = {spread(x0), spread(x1), spread(x2), spread(x3)};
            for (p = 0; p < PIXELS; p++) {
                s[p].first = _mm256_dpbusd_avx_epi32(s[p].first, bytes[p], w0);
                s[p].second = _mm256_dpbusd_avx_epi32(s[p].second, bytes[p], w1);
            }
        }
    }
}
#else
INLINE void narrow_step(sums *n, const uint8_t *x0, const uint8_t *x1, const uint8_t *x2,
                        const uint8_t *x3, const uint8_t *w)
{
    const __m256i w0 = vector(w), w1 = vector(w + 32);
    const __m256i bytes[PIXELS] = {spread(x0), spread(x1), spread(x2), spread(x3)};
    unsigned p;
    for (p = 0; p < PIXELS; p++) {
        n[p].first = _mm256_add_epi16(n[p].first, _mm256_maddubs_epi16(bytes[p], w0));
        n[p].second = _mm256_add_epi16(n[p].second, _mm256_maddubs_epi16(bytes[p], w1));
        /* Compilers otherwise add the products of two steps first, and run out of registers. */
        __asm__("" : "+x"(n[p].first), "+x"(n[p].second));
    }
}

/* Sums of a few steps, which fit in 16 bits. */
INLINE void narrow_run(sums *s, const uint8_t *x, const unsigned *at, const uint8_t *w,
                       unsigned steps)
{
    const uint8_t *x0 = x + at[0], *x1 = x + at[1], *x2 = x + at[2], *x3 = x + at[3];
    const __m256i ones = _mm256_set1_epi16(1);
    sums n[PIXELS]; /* of 16 bits */
    unsigned p;
    for (p = 0; p < PIXELS; p++)
        n[p] = no_sums();
    for (; steps > 1; steps -= 2, w += LANES * 8, x0 += 8, x1 += 8, x2 += 8, x3 += 8) {
        narrow_step(n, x0, x1, x2, x3, w);
        narrow_step(n, x0 + 4, x1 + 4, x2 + 4, x3 + 4, w + LANES * 4);
    }
    if (steps != 0)
        narrow_step(n, x0, x1, x2, x3, w);
    for (p = 0; p < PIXELS; p++) {
        s[p].first = _mm256_madd_epi16(n[p].first, ones);
        s[p].second = _mm256_madd_epi16(n[p].second, ones);
    }
}

/* Adds products of unsigned inputs and signed weights of 8 bits. */
INLINE void narrow_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                        const form *f)
{
    unsigned r, i, p;
    if (f->rows == 1 && f->steps <= f->run) {
        narrow_run(s, x[0], at, w, f->steps);
        return;
    }
    for (p = 0; p < PIXELS; p++)
        s[p] = no_sums();
    for (r = 0; r < f->rows; r++, w += LANES * 4 * f->steps)
        for (i = 0; i < f->steps; i += f->run) {
            sums more[PIXELS];
            narrow_run(more, x[r] + 4 * i, at, w + LANES * 4 * i, smaller(f->run, f->steps - i));
            for (p = 0; p < PIXELS; p++) {
                s[p].first = _mm256_add_epi32(s[p].first, more[p].first);
                s[p].second = _mm256_add_epi32(s[p].second, more[p].second);
            }
        }
}
#endif

/* Adds products of numbers of 16 bits. */
INLINE void wide_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                      const form *f)
{
    unsigned r, i, p;
    for (p = 0; p < PIXELS; p++)
        s[p] = no_sums();
    for (r = 0; r < f->rows; r++) {
        const uint8_t *x0 = x[r] + at[0], *x1 = x[r] + at[1];
        const uint8_t *x2 = x[r] + at[2], *x3 = x[r] + at[3];
        for (i = 0; i < f->steps; i++, w += LANES * 4, x0 += 4, x1 += 4, x2 += 4, x3 += 4) {
            const __m256i w0 = vector(w), w1 = vector(w + 32);
            const __m256i pairs[PIXELS] = {spread(x0), spread(x1), spread(x2), spread(x3)};
            for (p = 0; p < PIXELS; p++) {
                s[p].first = _mm256_add_epi32(s[p].first, _mm256_madd_epi16(pairs[p], w0));
                s[p].second = _mm256_add_epi32(s[p].second, _mm256_madd_epi16(pairs[p], w1));
            }
        }
    }
}

/* Adds the products of each channel by itself, two taps at a time. */
INLINE sums each_sums(const uint8_t *const *x, unsigned at, const uint8_t *w, unsigned steps,
                      uint8_t type)
{
    sums s = no_sums();
    for (; steps != 0; steps--, x += 2, w += LANES * 4) {
        const __m256i a = numbers(x[0] + at, type), b = numbers(x[1] + at, type);
        const __m256i first = _mm256_unpacklo_epi16(a, b), second = _mm256_unpackhi_epi16(a, b);
        s.first = _mm256_add_epi32(s.first, _mm256_madd_epi16(first, vector(w)));
        s.second = _mm256_add_epi32(s.second, _mm256_madd_epi16(second, vector(w + 32)));
    }
    return s;
}

/* Clips 16 codes of 32 bits and stores them. Packing clips to the type's limits. */
INLINE void put_codes(uint8_t *to, const sums *s, const layer *l, uint8_t type)
{
    if (type == INT32) {
        const __m256i low = _mm256_set1_epi32(l->low), high = _mm256_set1_epi32(l->high);
        const __m256i a = _mm256_min_epi32(_mm256_max_epi32(s->first, low), high);
        const __m256i b = _mm256_min_epi32(_mm256_max_epi32(s->second, low), high);
        put_vector(to, _mm256_permute2x128_si256(a, b, 0x20));
        put_vector(to + 32, _mm256_permute2x128_si256(a, b, 0x31));
    } else {
        const __m256i low = _mm256_set1_epi16((int16_t)l->low);
        const __m256i high = _mm256_set1_epi16((int16_t)l->high);
        __m256i codes = _mm256_packs_epi32(s->first, s->second);
        if (type != UINT8 || l->low != 0 || l->high != 255)
            codes = _mm256_min_epi16(_mm256_max_epi16(codes, low), high);
        if (type == INT16) {
            put_vector(to, codes);
        } else {
            const __m128i a = _mm256_castsi256_si128(codes);
            const __m128i b = _mm256_extracti128_si256(codes, 1);
            _mm_storeu_si128((__m128i *)(void *)to,
                             type == INT8 ? _mm_packs_epi16(a, b) : _mm_packus_epi16(a, b));
        }
    }
}

/* Brings 16 sums to codes. */
INLINE sums finish(sums s, const block *b)
{
    s.first = _mm256_mullo_epi32(s.first, vector(b->multiplier));
    s.second = _mm256_mullo_epi32(s.second, vector(b->multiplier + 8));
    s.first = _mm256_add_epi32(s.first, vector(b->bias));
    s.second = _mm256_add_epi32(s.second, vector(b->bias + 8));
    s.first = _mm256_srav_epi32(s.first, vector(b->shift));
    s.second = _mm256_srav_epi32(s.second, vector(b->shift + 8));
    return s;
}

/* Brings 16 sums of two numbers to codes. */
INLINE sums add(const uint8_t *a, uint8_t a_type, const uint8_t *b, uint8_t b_type, const layer *l)
{
    const __m256i x = numbers(a, a_type), y = numbers(b, b_type);
    const uint32_t high = (uint32_t)(int32_t)l->multiplier[1] << 16;
    const __m256i by = _mm256_set1_epi32((int32_t)(high | (uint16_t)l->multiplier[0]));
    const __m256i bias = _mm256_set1_epi32(l->bias[0]);
    const __m128i shift = _mm_cvtsi32_si128(l->shift[0]);
    sums s;
    s.first = _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), by);
    s.second = _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), by);
    s.first = _mm256_sra_epi32(_mm256_add_epi32(s.first, bias), shift);
    s.second = _mm256_sra_epi32(_mm256_add_epi32(s.second, bias), shift);
    return s;
}

typedef __m256i whole;

INLINE whole no_bytes(void)
{
    return _mm256_setzero_si256();
}

/* Adds the bytes that a mask has. */
INLINE whole with_bytes(whole x, const uint8_t *bytes, const uint8_t *mask)
{
    return _mm256_or_si256(x, _mm256_and_si256(vector(bytes), vector(mask)));
}

INLINE void put_bytes(uint8_t *to, whole x)
{
    put_vector(to, x);
}
#endif
#else
enum { PIXELS = 4, WIDE_STEP = 1, VECTOR = 16 };

typedef struct {
    int32x4_t v[4];
} sums;

static unsigned lane_of(unsigned channel)
{
    return channel;
}

INLINE sums no_sums(void)
{
    const int32x4_t zero = vdupq_n_s32(0);
    const sums s = {{zero, zero, zero, zero}};
    return s;
}

INLINE void narrow_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                        const form *f)
{
    (void)s, (void)x, (void)at, (void)w, (void)f; /* never called */
}

/* Adds products of numbers of 16 bits. */
INLINE void wide_sums(sums *s, const uint8_t *const *x, const unsigned *at, const uint8_t *w,
                      const form *f)
{
    unsigned r, i, p;
    for (p = 0; p < PIXELS; p++)
        s[p] = no_sums();
    for (r = 0; r < f->rows; r++)
        for (i = 0; i < f->steps; i++, w += LANES * 2) {
            const int16x8_t w0 = vld1q_s16((const int16_t *)(const void *)w);
            const int16x8_t w1 = vld1q_s16((const int16_t *)(const void *)(w + LANES));
            for (p = 0; p < PIXELS; p++) {
                const int16_t number = ((const int16_t *)(const void *)(x[r] + at[p]))[i];
                s[p].v[0] = vmlal_n_s16(s[p].v[0], vget_low_s16(w0), number);
                s[p].v[1] = vmlal_n_s16(s[p].v[1], vget_high_s16(w0), number);
                s[p].v[2] = vmlal_n_s16(s[p].v[2], vget_low_s16(w1), number);
                s[p].v[3] = vmlal_n_s16(s[p].v[3], vget_high_s16(w1), number);
            }
        }
}

/* Returns 8 numbers as numbers of 16 bits. */
INLINE int16x8_t numbers(const uint8_t *from, uint8_t type)
{
    if (type == INT16)
        return vld1q_s16((const int16_t *)(const void *)from);
    return type == INT8 ? vmovl_s8(vld1_s8((const int8_t *)from))
                        : vreinterpretq_s16_u16(vmovl_u8(vld1_u8(from)));
}

INLINE void widen(int16_t *to, const uint8_t *from, uint8_t type)
{
    vst1q_s16(to, numbers(from, type));
    vst1q_s16(to + 8, numbers(from + 8 * size_of(type), type));
}

/* Adds the products of each channel by itself. */
INLINE sums each_sums(const uint8_t *const *x, unsigned at, const uint8_t *w, unsigned steps,
                      uint8_t type)
{
    sums s = no_sums();
    for (; steps != 0; steps--, x++) {
        unsigned i;
        for (i = 0; i < 2; i++, w += LANES) {
            const int16x8_t a = numbers(*x + at + 8 * i * size_of(type), type);
            const int16x8_t b = vld1q_s16((const int16_t *)(const void *)w);
            s.v[2 * i] = vmlal_s16(s.v[2 * i], vget_low_s16(a), vget_low_s16(b));
            s.v[2 * i + 1] = vmlal_s16(s.v[2 * i + 1], vget_high_s16(a), vget_high_s16(b));
        }
    }
    return s;
}

/* Clips 16 codes of 32 bits and stores them. */
INLINE void put_codes(uint8_t *to, const sums *s, const layer *l, uint8_t type)
{
    const int32x4_t low = vdupq_n_s32(l->low), high = vdupq_n_s32(l->high);
    int32x4_t v[4];
    int16x8_t a, b;
    unsigned i;
    for (i = 0; i < 4; i++)
        v[i] = vminq_s32(vmaxq_s32(s->v[i], low), high);
    a = vcombine_s16(vmovn_s32(v[0]), vmovn_s32(v[1]));
    b = vcombine_s16(vmovn_s32(v[2]), vmovn_s32(v[3]));
    if (type == INT32) {
        for (i = 0; i < 4; i++)
            vst1q_s32((int32_t *)(void *)to + 4 * i, v[i]);
    } else if (type == INT16) {
        vst1q_s16((int16_t *)(void *)to, a);
        vst1q_s16((int16_t *)(void *)to + 8, b);
    } else {
        vst1q_s8((int8_t *)to, vcombine_s8(vmovn_s16(a), vmovn_s16(b)));
    }
}

/* Brings 16 sums to codes. */
INLINE sums finish(sums s, const block *b)
{
    unsigned i;
    for (i = 0; i < 4; i++) {
        const int32x4_t by = vld1q_s32(b->multiplier + 4 * i);
        s.v[i] = vmlaq_s32(vld1q_s32(b->bias + 4 * i), s.v[i], by);
        s.v[i] = vshlq_s32(s.v[i], vnegq_s32(vld1q_s32(b->shift + 4 * i)));
    }
    return s;
}

/* Brings 16 sums of two numbers to codes. */
INLINE sums add(const uint8_t *a, uint8_t a_type, const uint8_t *b, uint8_t b_type, const layer *l)
{
    const int32x4_t bias = vdupq_n_s32(l->bias[0]), shift = vdupq_n_s32(-(int)l->shift[0]);
    const int16_t by_a = l->multiplier[0], by_b = l->multiplier[1];
    sums s;
    unsigned i;
    for (i = 0; i < 2; i++) {
        const int16x8_t x = numbers(a + 8 * i * size_of(a_type), a_type);
        const int16x8_t y = numbers(b + 8 * i * size_of(b_type), b_type);
        const int32x4_t first = vmlal_n_s16(bias, vget_low_s16(x), by_a);
        const int32x4_t second = vmlal_n_s16(bias, vget_high_s16(x), by_a);
        s.v[2 * i] = vshlq_s32(vmlal_n_s16(first, vget_low_s16(y), by_b), shift);
        s.v[2 * i + 1] = vshlq_s32(vmlal_n_s16(second, vget_high_s16(y), by_b), shift);
    }
    return s;
}

typedef uint8x16_t whole;

INLINE whole no_bytes(void)
{
    return vdupq_n_u8(0);
}

/* Adds the bytes that a mask has. */
INLINE whole with_bytes(whole x, const uint8_t *bytes, const uint8_t *mask)
{
    return vorrq_u8(x, vandq_u8(vld1q_u8(bytes), vld1q_u8(mask)));
}

INLINE void put_bytes(uint8_t *to, whole x)
{
    vst1q_u8(to, x);
}
#endif

/* How a layer's weights are unpacked. */
static form form_of(const layer *l)
{
    form f;
    memset(&f, 0, sizeof f);
    f.rows = 1;
    f.numbers = l->tap_count;
    if (l->kind == SHIFTED) {
        f.numbers = l->inputs;
    } else if (l->channel == 0) {
        f.rows = l->window;
        f.numbers = l->tap_count / l->window * (unsigned)l->inputs;
    }
#ifdef __AVX2__
    if (l->channel == 0 && l->input_type < INT16) {
        int i, largest = l->levels ? 1 : 127;
        for (i = 0; l->levels && i < 1 << l->bits; i++) {
            const int magnitude = l->levels[i] < 0 ? -l->levels[i] : l->levels[i];
            largest = magnitude > largest ? magnitude : largest;
        }
#ifdef NET_VNNI
        f.run = largest < 128;
#else
        f.run = 32767 / (2 * 255 * (unsigned)largest);
#endif
    }
#endif
    f.steps = f.run ? (f.numbers + 3) / 4 : (f.numbers + WIDE_STEP - 1) / WIDE_STEP;
    f.bytes = f.rows * f.steps * LANES * (f.run ? 4 : 2 * WIDE_STEP);
    return f;
}

static void unpack(const layer *l, const form *f)
{
    const unsigned step = f->run ? 4 : WIDE_STEP;
    weight_reader reader = {0, 0, 0};
    unsigned o, r, i;
    reader.next = l->weights;
    for (o = 0; o < l->channels; o++) {
        const unsigned lane = lane_of(o % LANES);
        block *b = f->blocks + o / LANES;
        uint8_t *to = f->weights + o / LANES * f->bytes;
        uint32_t total = 0;
        for (r = 0; r < f->rows; r++)
            for (i = 0; i < f->numbers; i++) {
                const int weight = next_weight(&reader, l);
                const unsigned at = ((r * f->steps + i / step) * LANES + lane) * step + i % step;
                total += (uint32_t)weight;
                if (f->run)
                    ((int8_t *)to)[at] = (int8_t)weight;
                else
                    ((int16_t *)(void *)to)[at] = (int16_t)weight;
            }
        b->multiplier[lane] = l->multiplier[o];
        b->shift[lane] = l->shift[o];
        /* Narrow sums read signed inputs as 128 more. */
        if (l->input_type != INT8 || !f->run)
            total = 0;
        b->bias[lane] = (int32_t)((uint32_t)l->bias[o]
                                  - 128 * total * (uint32_t)(int32_t)l->multiplier[o]);
    }
}

/* Marks the bytes of a row that each tap of a shift reads, except where that is outside. */
static void make_masks(const layer *l, uint8_t *masks)
{
    const unsigned size = size_of(l->input_type);
    unsigned p, c;
    for (p = 0; p < l->width; p++)
        for (c = 0; c < l->inputs; c++) {
            const unsigned t = l->directions    ? l->directions[c]
                               : c < l->moved ? c % l->tap_count
                                              : l->centre;
            if (p >= l->taps[t].first && p < (unsigned)l->taps[t].first + l->taps[t].count)
                memset(masks + ((t * l->width + p) * l->inputs + c) * size, 255, size);
        }
}

static void unpack_all(void)
{
    uint8_t *next = unpacked;
    unsigned i;
    for (i = 0; i < NET_LAYERS; i++) {
        const layer *l = &layers[i];
        form *f = &forms[i];
        unsigned blocks;
        if (l->kind != SUMS && l->kind != SHIFTED)
            continue;
        *f = form_of(l);
        blocks = (l->channels + LANES - 1u) / LANES;
        f->weights = next;
        f->blocks = (block *)(void *)(f->weights + blocks * f->bytes);
        f->masks = next = (uint8_t *)(f->blocks + blocks);
        unpack(l, f);
        if (l->kind == SHIFTED) {
            make_masks(l, f->masks);
            next += (l->tap_count * l->width * l->inputs * size_of(l->input_type) + 63) / 64 * 64;
        }
    }
}

/* Takes each byte of some vectors from the place whose mask has it. */
INLINE void choose(uint8_t *to, const uint8_t *const *from, const uint8_t *const *masks,
                   unsigned count, unsigned at, unsigned vectors)
{
    whole chosen[4];
    unsigned i, j;
    for (j = 0; j < vectors; j++)
        chosen[j] = no_bytes();
    for (i = 0; i < count; i++)
        for (j = 0; j < vectors; j++)
            chosen[j] = with_bytes(chosen[j], from[i] + at + VECTOR * j, masks[i] + at + VECTOR * j);
    for (j = 0; j < vectors; j++)
        put_bytes(to + at + VECTOR * j, chosen[j]);
}

/* Stores up to 16 codes. */
INLINE void put(uint8_t *to, const sums *s, const layer *l, uint8_t type, unsigned count)
{
    if (count >= LANES) {
        put_codes(to, s, l, type);
    } else {
        uint8_t codes[LANES * 4];
        put_codes(codes, s, l, type);
        memcpy(to, codes, count * size_of(type));
    }
}

/* One row of a shift's result. */
static void shift_row(const layer *l, const form *f, const uint8_t *const *rows)
{
    const unsigned pixel = l->inputs * size_of(l->input_type), row = pixel * l->width;
    const unsigned bytes = pixel == l->across ? row : pixel;
    const uint8_t *from[NET_TAPS], *masks[NET_TAPS];
    unsigned t, p, i, count = 0;
    for (t = 0; t < l->tap_count; t++) {
        const tap *at = &l->taps[t];
        if (rows[at->row] != 0 && at->count != 0) {
            from[count] = rows[at->row] + (at->offset - at->first * l->across);
            masks[count++] = f->masks + t * row;
        }
    }
    for (p = 0; p < row; p += bytes) {
        for (i = 0; i + 4 * VECTOR <= bytes; i += 4 * VECTOR)
            choose(moved + p, from, masks, count, i, 4);
        for (; i < bytes; i += VECTOR)
            choose(moved + p, from, masks, count, i, 1);
        for (t = 0; t < count; t++) {
            from[t] += l->across;
            masks[t] += pixel;
        }
    }
}

/* Rows as sums read them, from the first pixel that the layer reads on: zeros outside of the image,
   signed bytes as 128 more, numbers of 16 bits if the sums are wide. */
typedef struct {
    const uint8_t *row[NET_WINDOW];
    unsigned pixel; /* bytes between what two neighbours of the result read */
    unsigned size;  /* of a number */
} window;

static void prepare(window *x, const layer *l, const form *f, const uint8_t *const *rows)
{
    const layer *in = &layers[l->source[0]];
    const unsigned shifted = l->kind == SHIFTED;
    const unsigned width = shifted ? l->width : in->width, stride = shifted ? 0 : l->stride;
    const unsigned columns = shifted ? 1 : l->tap_count / l->window;
    const unsigned left = shifted ? 0 : l->padding * (unsigned)in->channels;
    const unsigned all = (((l->width - 1u) << stride) + columns) * in->channels;
    const unsigned have = smaller(width * in->channels, all - left);
    const int flip = f->run != 0 && l->input_type == INT8;
    const int wide = f->run == 0 && l->channel == 0 && l->input_type != INT16;
    const uint8_t *result = moved;
    unsigned r, i;
    if (shifted) {
        shift_row(l, f, rows);
        rows = &result;
    }
    x->size = wide ? 2 : size_of(l->input_type);
    x->pixel = in->channels * x->size << stride;
    for (r = 0; r < (shifted ? 1u : l->window); r++) {
        const uint8_t *from = rows[r];
        uint8_t *to = prepared[r];
        x->row[r] = to;
        if (from == 0) {
            memset(to, flip ? 128 : 0, all * x->size);
            continue;
        }
        if (!flip && !wide && have == all) {
            x->row[r] = from;
            continue;
        }
        memset(to, flip ? 128 : 0, left * x->size);
        to += left * x->size;
        if (wide)
            for (i = 0; i < have; i += LANES)
                widen((int16_t *)(void *)to + i, from + i, l->input_type);
        else if (flip)
            for (i = 0; i < have; i++)
                to[i] = from[i] ^ 128;
        else
            memcpy(to, from, have * x->size);
        memset(to + have * x->size, flip ? 128 : 0, (all - left - have) * x->size);
    }
}

/* Sums over all channels of the input. */
INLINE void dense_row_of(const window *x, const layer *l, const form *f, uint8_t *out, int narrow,
                         uint8_t type)
{
    const unsigned size = size_of(type);
    unsigned o, p, i;
    for (o = 0; o < l->channels; o += LANES) {
        const uint8_t *w = f->weights + o / LANES * f->bytes;
        const block *b = f->blocks + o / LANES;
        const unsigned count = smaller(LANES, l->channels - o);
        uint8_t *to = out + o * size;
        for (p = 0; p < l->width; p += PIXELS) {
            sums s[PIXELS];
            unsigned at[PIXELS];
            for (i = 0; i < PIXELS; i++)
                at[i] = smaller(p + i, l->width - 1u) * x->pixel;
            if (narrow)
                narrow_sums(s, x->row, at, w, f);
            else
                wide_sums(s, x->row, at, w, f);
            for (i = 0; i < PIXELS; i++, to += l->pixel)
                if (p + i < l->width) {
                    const sums codes = finish(s[i], b);
                    put(to, &codes, l, type, count);
                }
        }
    }
}

INLINE void dense_row(const window *x, const layer *l, const form *f, uint8_t *out, uint8_t type)
{
    if (f->run != 0)
        dense_row_of(x, l, f, out, 1, type);
    else
        dense_row_of(x, l, f, out, 0, type);
}

/* Sums over each channel of the input by itself. */
static void each_row(const window *x, const layer *l, const form *f, uint8_t *out)
{
    const unsigned columns = l->tap_count / l->window, size = size_of(l->type);
    const unsigned pixel = x->pixel >> l->stride;
    const uint8_t *from[NET_TAPS + WIDE_STEP];
    unsigned o, p, t;
    for (t = 0; t < l->tap_count; t++)
        from[t] = x->row[t / columns] + t % columns * pixel;
    from[t] = from[0]; /* times 0, in the last step of an odd number */
    for (o = 0; o < l->channels; o += LANES)
        for (p = 0; p < l->width; p++) {
            const unsigned at = p * x->pixel + o * x->size;
            const uint8_t *w = f->weights + o / LANES * f->bytes;
            const sums s = each_sums(from, at, w, f->steps, l->input_type);
            const sums codes = finish(s, f->blocks + o / LANES);
            put(out + p * l->pixel + o * size, &codes, l, l->type, smaller(LANES, l->channels - o));
        }
}

/* Sums of products for one row of all channels, brought to codes. */
static void sums_row(const layer *l, const uint8_t *const *rows, uint8_t *out)
{
    const form *f = &forms[l - layers];
    window x;
    prepare(&x, l, f, rows);
    if (l->channel != 0)
        each_row(&x, l, f, out);
    else if (l->type == UINT8) /* a constant, so that sums stay in registers */
        dense_row(&x, l, f, out, UINT8);
    else if (l->type == INT8)
        dense_row(&x, l, f, out, INT8);
    else
        dense_row(&x, l, f, out, l->type);
}

/* One row of a sum; the second summand can have fewer channels. */
INLINE void sum_row_of(const layer *l, const uint8_t *a, const uint8_t *b, const layer *of_a,
                       const layer *of_b, uint8_t *out, uint8_t a_type, uint8_t b_type,
                       uint8_t type)
{
    const unsigned size = size_of(type), a_size = size_of(a_type), b_size = size_of(b_type);
    const int same = of_a->channels == of_b->channels;
    const unsigned channels = same ? (unsigned)l->channels * l->width : l->channels;
    const unsigned b_channels = same ? channels : of_b->channels;
    const uint8_t *end = out + l->row;
    unsigned c;
    for (; out != end; a += channels * a_size, b += b_channels * b_size, out += channels * size)
        for (c = 0; c < channels; c += LANES) {
            const unsigned count = smaller(LANES, channels - c);
            const uint8_t *y = b + c * b_size;
            uint8_t some[LANES * 2] = {0};
            sums s;
            if (c + count > b_channels) {
                memcpy(some, y, (c < b_channels ? b_channels - c : 0) * b_size);
                y = some;
            }
            s = add(a + c * a_size, a_type, y, b_type, l);
            put(out + c * size, &s, l, type, count);
        }
}

static void sum_row(const layer *l, const uint8_t *a, const uint8_t *b, const layer *of_a,
                    const layer *of_b, uint8_t *out)
{
    if (of_a->type == UINT8 && of_b->type == UINT8 && l->type == UINT8)
        sum_row_of(l, a, b, of_a, of_b, out, UINT8, UINT8, UINT8);
    else
        sum_row_of(l, a, b, of_a, of_b, out, of_a->type, of_b->type, l->type);
}
