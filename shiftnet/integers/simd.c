/* The same rows for 4 pixels and 16 channels at a time, with the processor's multiplications. The
   integers are those of the code above, which defines them. The weights of a segment are unpacked
   before it, in blocks of 16 channels:

       weights[block][step][channel in the block][number in the step]

   A step reads 4 bytes of each pixel's input with AVX2: 4 numbers of 8 bits where the sums of some
   steps fit in 16 bits ("narrow"), else 2 numbers of 16 bits; with NEON one number of 16 bits. */
enum { LANES = 16, PIXELS = 4, SLACK = NET_SLACK };

#define ALIGNED __attribute__((aligned(64)))

typedef struct {
    int32_t multiplier[LANES], bias[LANES], shift[LANES];
} block;

#ifdef __AVX2__
enum { NARROW_STEP = 4, WIDE_STEP = 2, UNPACKED = NET_UNPACKED_NARROW };
#else
enum { NARROW_STEP = 0, WIDE_STEP = 1, UNPACKED = NET_UNPACKED_WIDE };
#endif

/* Of each layer of a segment: weights, blocks and the masks of its shift. */
static uint8_t unpacked[UNPACKED] ALIGNED;
static uint8_t *place[NET_LAYERS];
static int16_t channel_weights[NET_DEEPEST];
/* What the sums of 4 pixels read, a pixel of a shift's result, and a pixel outside of the image.
   Like `memory` they end after what they hold, since 16 numbers are read at a time. */
static uint8_t columns[PIXELS * NET_DEEPEST * 2 + SLACK] ALIGNED;
static uint8_t moved[NET_DEEPEST * 2 + SLACK] ALIGNED;
static uint8_t nothing[NET_DEEPEST * 2 + SLACK] ALIGNED;

static unsigned smaller(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

#ifdef __AVX2__
static __m256i vector(const void *x)
{
    return _mm256_loadu_si256((const __m256i *)x);
}

static void put_vector(void *to, __m256i x)
{
    _mm256_storeu_si256((__m256i *)to, x);
}

static __m256i four_bytes(const uint8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

/* Adds products of unsigned inputs and signed weights of 8 bits; `run` steps fit in 16 bits. */
static void narrow_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                        const uint8_t *w, unsigned steps, unsigned run)
{
    const uint8_t *x1 = x + pixel, *x2 = x1 + pixel, *x3 = x2 + pixel;
    const __m256i ones = _mm256_set1_epi16(1);
    size_t i = 0;
    unsigned p;
    while (i < 4 * steps) {
        const size_t end = smaller(4 * steps, (unsigned)i + 4 * run);
        const int begun = i != 0;
        __m256i s[PIXELS][2];
        for (p = 0; p < PIXELS; p++)
            s[p][0] = s[p][1] = _mm256_setzero_si256();
        for (; i < end; i += 4) {
            const __m256i w0 = vector(w + LANES * i), w1 = vector(w + LANES * i + 32);
            const __m256i bytes[PIXELS] = {four_bytes(x + i), four_bytes(x1 + i),
                                           four_bytes(x2 + i), four_bytes(x3 + i)};
            for (p = 0; p < PIXELS; p++) {
                s[p][0] = _mm256_add_epi16(s[p][0], _mm256_maddubs_epi16(bytes[p], w0));
                s[p][1] = _mm256_add_epi16(s[p][1], _mm256_maddubs_epi16(bytes[p], w1));
            }
        }
        for (p = 0; p < PIXELS; p++) {
            __m256i a = _mm256_madd_epi16(s[p][0], ones), b = _mm256_madd_epi16(s[p][1], ones);
            if (begun) {
                a = _mm256_add_epi32(a, vector(to[p]));
                b = _mm256_add_epi32(b, vector(to[p] + 8));
            }
            put_vector(to[p], a);
            put_vector(to[p] + 8, b);
        }
    }
}

static void wide_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                      const uint8_t *w, unsigned steps)
{
    const uint8_t *x1 = x + pixel, *x2 = x1 + pixel, *x3 = x2 + pixel;
    __m256i s[PIXELS][2];
    size_t i;
    unsigned p;
    for (p = 0; p < PIXELS; p++)
        s[p][0] = s[p][1] = _mm256_setzero_si256();
    for (i = 0; i < 4 * steps; i += 4) {
        const __m256i w0 = vector(w + LANES * i), w1 = vector(w + LANES * i + 32);
        const __m256i pairs[PIXELS] = {four_bytes(x + i), four_bytes(x1 + i), four_bytes(x2 + i),
                                       four_bytes(x3 + i)};
        for (p = 0; p < PIXELS; p++) {
            s[p][0] = _mm256_add_epi32(s[p][0], _mm256_madd_epi16(pairs[p], w0));
            s[p][1] = _mm256_add_epi32(s[p][1], _mm256_madd_epi16(pairs[p], w1));
        }
    }
    for (p = 0; p < PIXELS; p++) {
        put_vector(to[p], s[p][0]);
        put_vector(to[p] + 8, s[p][1]);
    }
}

/* Returns 16 numbers as numbers of 16 bits. */
static __m256i numbers(const uint8_t *from, uint8_t type)
{
    if (type == INT16)
        return vector(from);
    {
        const __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)from);
        return type == INT8 ? _mm256_cvtepi8_epi16(bytes) : _mm256_cvtepu8_epi16(bytes);
    }
}

static void widen(int16_t *to, const uint8_t *from, uint8_t type)
{
    put_vector(to, numbers(from, type));
}

/* Clips 16 numbers of 16 bits and stores them. */
static void put_codes(uint8_t *to, __m256i codes, const layer *l)
{
    codes = _mm256_max_epi16(codes, _mm256_set1_epi16((int16_t)l->low));
    codes = _mm256_min_epi16(codes, _mm256_set1_epi16((int16_t)l->high));
    if (l->type == INT16) {
        put_vector(to, codes);
    } else {
        const __m256i bytes = _mm256_and_si256(codes, _mm256_set1_epi16(255));
        const __m128i low = _mm256_castsi256_si128(bytes), up = _mm256_extracti128_si256(bytes, 1);
        _mm_storeu_si128((__m128i *)(void *)to, _mm_packus_epi16(low, up));
    }
}

/* Brings 16 sums to codes. */
static void finish(uint8_t *to, const int32_t *sum, const block *b, const layer *l)
{
    __m256i v[2];
    unsigned i;
    for (i = 0; i < 2; i++) {
        v[i] = _mm256_mullo_epi32(vector(sum + 8 * i), vector(b->multiplier + 8 * i));
        v[i] = _mm256_add_epi32(v[i], vector(b->bias + 8 * i));
        v[i] = _mm256_srav_epi32(v[i], vector(b->shift + 8 * i));
    }
    if (l->type == INT32) {
        const __m256i low = _mm256_set1_epi32(l->low), high = _mm256_set1_epi32(l->high);
        for (i = 0; i < 2; i++)
            put_vector(to + 32 * i, _mm256_min_epi32(_mm256_max_epi32(v[i], low), high));
    } else {
        put_codes(to, _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8), l);
    }
}

/* Brings 16 sums of two numbers to codes. */
static void add(uint8_t *to, const uint8_t *a, uint8_t a_type, const uint8_t *b, uint8_t b_type,
                const layer *l)
{
    const __m256i x = numbers(a, a_type), y = numbers(b, b_type);
    const uint32_t high = (uint32_t)(int32_t)l->multiplier[1] << 16;
    const __m256i by = _mm256_set1_epi32((int32_t)(high | (uint16_t)l->multiplier[0]));
    const __m256i bias = _mm256_set1_epi32(l->bias[0]);
    const __m128i shift = _mm_cvtsi32_si128(l->shift[0]);
    __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), by);
    __m256i up = _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), by);
    low = _mm256_sra_epi32(_mm256_add_epi32(low, bias), shift);
    up = _mm256_sra_epi32(_mm256_add_epi32(up, bias), shift);
    put_codes(to, _mm256_packs_epi32(low, up), l);
}

/* Takes each of 16 bytes from the place whose mask has it. */
static void choose(uint8_t *to, const uint8_t *const *from, const uint8_t *const *masks,
                   unsigned count, size_t from_offset, size_t mask_offset)
{
    __m128i chosen = _mm_setzero_si128();
    unsigned i;
    for (i = 0; i < count; i++) {
        const void *bytes = from[i] + from_offset, *mask = masks[i] + mask_offset;
        chosen = _mm_or_si128(chosen, _mm_and_si128(_mm_loadu_si128((const __m128i *)bytes),
                                                    _mm_loadu_si128((const __m128i *)mask)));
    }
    _mm_storeu_si128((__m128i *)(void *)to, chosen);
}
#else
static void narrow_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                        const uint8_t *w, unsigned steps, unsigned run)
{
    (void)to, (void)x, (void)pixel, (void)w, (void)steps, (void)run; /* never called */
}

static void wide_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                      const uint8_t *w, unsigned steps)
{
    const int16_t *from = (const int16_t *)(const void *)x;
    const unsigned next = pixel / 2;
    int32x4_t s[PIXELS][4];
    unsigned p, i;
    for (p = 0; p < PIXELS; p++)
        for (i = 0; i < 4; i++)
            s[p][i] = vdupq_n_s32(0);
    for (; steps != 0; steps--, w += LANES * 2, from++) {
        const int16x8_t w0 = vld1q_s16((const int16_t *)(const void *)w);
        const int16x8_t w1 = vld1q_s16((const int16_t *)(const void *)(w + LANES));
        for (p = 0; p < PIXELS; p++) {
            const int16_t number = from[p * next];
            s[p][0] = vmlal_n_s16(s[p][0], vget_low_s16(w0), number);
            s[p][1] = vmlal_n_s16(s[p][1], vget_high_s16(w0), number);
            s[p][2] = vmlal_n_s16(s[p][2], vget_low_s16(w1), number);
            s[p][3] = vmlal_n_s16(s[p][3], vget_high_s16(w1), number);
        }
    }
    for (p = 0; p < PIXELS; p++)
        for (i = 0; i < 4; i++)
            vst1q_s32(to[p] + 4 * i, s[p][i]);
}

static void widen(int16_t *restrict to, const uint8_t *restrict from, uint8_t type)
{
    unsigned i;
    if (type == INT16)
        memcpy(to, from, LANES * 2);
    else if (type == INT8)
        for (i = 0; i < LANES; i++)
            to[i] = (int8_t)from[i];
    else
        for (i = 0; i < LANES; i++)
            to[i] = from[i];
}

static void put_codes(uint8_t *restrict to, const int32_t *restrict values, const layer *l)
{
    const int32_t low = l->low, high = l->high;
    int32_t codes[LANES];
    int16_t halves[LANES];
    unsigned i;
    for (i = 0; i < LANES; i++) {
        const int32_t code = values[i] < low ? low : values[i];
        codes[i] = code > high ? high : code;
        halves[i] = (int16_t)codes[i];
    }
    if (l->type == INT32)
        memcpy(to, codes, sizeof codes);
    else if (l->type == INT16)
        memcpy(to, halves, sizeof halves);
    else
        for (i = 0; i < LANES; i++)
            to[i] = (uint8_t)codes[i];
}

static void finish(uint8_t *to, const int32_t *restrict sum, const block *restrict b,
                   const layer *l)
{
    int32_t values[LANES];
    unsigned i;
    for (i = 0; i < LANES; i++) {
        const uint32_t product = (uint32_t)sum[i] * (uint32_t)b->multiplier[i];
        values[i] = (int32_t)(product + (uint32_t)b->bias[i]) >> b->shift[i];
    }
    put_codes(to, values, l);
}

static void add(uint8_t *to, const uint8_t *a, uint8_t a_type, const uint8_t *b, uint8_t b_type,
                const layer *l)
{
    const int32_t by_a = l->multiplier[0], by_b = l->multiplier[1], bias = l->bias[0];
    const uint8_t shift = l->shift[0];
    int16_t x[LANES], y[LANES];
    int32_t values[LANES];
    unsigned i;
    widen(x, a, a_type);
    widen(y, b, b_type);
    for (i = 0; i < LANES; i++)
        values[i] = (x[i] * by_a + y[i] * by_b + bias) >> shift;
    put_codes(to, values, l);
}

static void choose(uint8_t *to, const uint8_t *const *from, const uint8_t *const *masks,
                   unsigned count, size_t from_offset, size_t mask_offset)
{
    uint8x16_t chosen = vdupq_n_u8(0);
    unsigned i;
    for (i = 0; i < count; i++)
        chosen = vorrq_u8(chosen, vandq_u8(vld1q_u8(masks[i] + mask_offset),
                                           vld1q_u8(from[i] + from_offset)));
    vst1q_u8(to, chosen);
}
#endif

/* What a layer's weights are unpacked to. */
typedef struct {
    uint8_t *weights;
    block *blocks;
    uint8_t *masks;
    unsigned depth, steps; /* numbers that a sum adds up, and the steps for them */
    unsigned run;          /* steps whose sums fit in 16 bits; 0: not narrow */
    unsigned bytes;        /* of a block's weights */
} form;

static form form_of(const layer *l)
{
    const unsigned blocks = (l->channels + LANES - 1u) / LANES;
    form f;
    f.depth = l->kind == SHIFTED ? l->inputs : (unsigned)l->tap_count * l->inputs;
    f.run = 0;
    if (NARROW_STEP != 0 && l->levels != 0 && l->channel == 0 && l->input_type < INT16) {
        unsigned i;
        int largest = 1;
        for (i = 0; i < 1u << l->bits; i++)
            largest = l->levels[i] > largest ? l->levels[i]
                      : -l->levels[i] > largest ? -l->levels[i] : largest;
        f.run = 32767u / (2u * 255u * (unsigned)largest);
    }
    f.steps = (f.depth + 3) / 4 * (f.run != 0 ? 1 : 4 / WIDE_STEP);
    f.bytes = l->weights == 0 ? 0
              : l->channel != 0 ? f.depth * LANES * 2
                                : (f.depth + 3) / 4 * 4 * LANES * (f.run != 0 ? 1 : 2);
    f.weights = place[l - layers];
    f.blocks = (block *)(void *)(f.weights + blocks * f.bytes);
    f.masks = (uint8_t *)(f.blocks + blocks);
    return f;
}

/* The weights of a channel, and zeros for the rest of its last step. */
static void unpack_channel(weight_reader *r, const layer *l, unsigned count)
{
    const uint8_t *from = r->next;
    int16_t *to = channel_weights;
    unsigned i, j;
    for (i = count; i % 4 != 0; i++)
        to[i] = 0;
    if (l->levels == 0) {
        for (i = 0; i < count; i++)
            to[i] = (int8_t)from[i];
        r->next += count;
    } else if (count % 8 == 0 && r->count == 0) {
        const unsigned bits = l->bits, mask = (1u << bits) - 1;
        for (i = 0; i < count; i += 8) {
            uint64_t word = 0;
            for (j = 0; j < bits; j++)
                word |= (uint64_t)*from++ << 8 * j;
            for (j = 0; j < 8; j++, word >>= bits)
                to[i + j] = l->levels[word & mask];
        }
        r->next = from;
    } else {
        for (i = 0; i < count; i++)
            to[i] = (int16_t)next_weight(r, l);
    }
}

/* Puts a channel's weights into its block. Returns their sum. */
static uint32_t put_channel(uint8_t *to, unsigned lane, const layer *l, const form *f)
{
    const int16_t *from = channel_weights;
    uint32_t total = 0;
    unsigned i;
    if (l->channel != 0) {
        for (i = 0; i < f->depth; i++)
            memcpy(to + (i * LANES + lane) * 2, from + i, 2);
    } else if (f->run == 0) {
        to += lane * WIDE_STEP * 2;
        for (i = 0; i < f->steps; i++, from += WIDE_STEP, to += LANES * WIDE_STEP * 2)
            memcpy(to, from, WIDE_STEP * 2);
    } else {
        int8_t bytes[NET_DEEPEST];
        for (i = 0; i < 4 * f->steps; i++) {
            bytes[i] = (int8_t)from[i];
            total += (uint32_t)(int32_t)from[i];
        }
        to += lane * 4;
        for (i = 0; i < f->steps; i++, to += LANES * 4)
            memcpy(to, bytes + 4 * i, 4);
    }
    return total;
}

static void unpack(const layer *l)
{
    const form f = form_of(l);
    weight_reader reader = {0, 0, 0};
    unsigned o, c;
    reader.next = l->weights;
    memset(f.blocks, 0, (size_t)(f.masks - (uint8_t *)f.blocks));
    for (o = 0; o < l->channels; o++) {
        const unsigned lane = o % LANES;
        block *b = f.blocks + o / LANES;
        uint32_t total = 0;
        if (l->weights != 0) {
            unpack_channel(&reader, l, f.depth);
            total = put_channel(f.weights + o / LANES * f.bytes, lane, l, &f);
        }
        b->multiplier[lane] = l->multiplier[o];
        b->shift[lane] = l->shift[o];
        /* A narrow layer reads signed inputs as 128 more. */
        if (l->input_type != INT8 || f.run == 0)
            total = 0;
        b->bias[lane] = (int32_t)((uint32_t)l->bias[o]
                                  - 128 * total * (uint32_t)(int32_t)l->multiplier[o]);
    }
    if (l->kind == SHIFTED) {
        const unsigned size = size_of(l->input_type);
        unsigned direction = 0;
        memset(f.masks, 0, l->tap_count * l->inputs * size);
        for (c = 0; c < l->inputs; c++) {
            const unsigned t = l->directions    ? l->directions[c]
                               : c < l->moved ? direction
                                              : l->centre;
            memset(f.masks + (t * l->inputs + c) * size, 255, size);
            if (++direction == l->tap_count)
                direction = 0;
        }
    }
}

/* Unpacks the weights of a segment's layers. */
static void unpack_segment(uint8_t first, uint8_t last)
{
    uint8_t *next = unpacked;
    uint8_t i;
    for (i = first; i <= last; i++)
        if (layers[i].kind == SUMS || layers[i].kind == SHIFTED) {
            const layer *l = &layers[i];
            form f;
            place[i] = next;
            f = form_of(l);
            unpack(l);
            next = f.masks;
            if (l->kind == SHIFTED)
                next += (l->tap_count * l->inputs * size_of(l->input_type) + 63) / 64 * 64;
        }
}

/* The same for up to 16 numbers, where more cannot be written. */
static void finish_some(uint8_t *to, const int32_t *sum, const block *b, const layer *l,
                        unsigned count)
{
    uint8_t codes[LANES * 4];
    if (count >= LANES) {
        finish(to, sum, b, l);
    } else {
        finish(codes, sum, b, l);
        memcpy(to, codes, count * size_of(l->type));
    }
}

/* Where the taps of a row's pixels read; the same until pixel `end`, except that it moves on. */
typedef struct {
    const uint8_t *from[NET_TAPS];  /* from pixel `start` */
    const uint8_t *masks[NET_TAPS]; /* of a shift */
    unsigned lengths[NET_TAPS];     /* of other layers: numbers, all taps one after the other */
    int outside[NET_TAPS];          /* whether it is outside of the image, and does not move */
    unsigned count, start, end;
} readers;

/* Finds what a pixel reads. */
static void find_readers(readers *r, const layer *l, const form *f, const uint8_t *const *rows,
                         unsigned pixel)
{
    const unsigned bytes = l->inputs * size_of(l->input_type);
    unsigned t;
    r->count = 0;
    r->start = pixel;
    r->end = l->width;
    for (t = 0; t < l->tap_count; t++) {
        const tap *at = l->taps + t;
        const unsigned first = at->first, last = first + at->count;
        const uint8_t *from = nothing;
        int outside = rows[at->row] == 0;
        if (!outside) {
            if (pixel < first)
                r->end = smaller(r->end, first);
            else if (pixel < last)
                r->end = smaller(r->end, last);
            outside = pixel < first || pixel >= last;
        }
        if (!outside)
            from = rows[at->row] + at->offset + (pixel - first) * l->across;
        if (l->kind == SHIFTED) {
            if (outside)
                continue;
            r->masks[r->count] = f->masks + t * bytes;
        } else if (l->channel == 0 && r->count != 0) { /* goes on where the last one ends */
            const unsigned before = r->count - 1;
            if (!outside && !r->outside[before]
                && from == r->from[before] + r->lengths[before] * size_of(l->input_type)) {
                r->lengths[before] += l->inputs;
                continue;
            }
        }
        r->from[r->count] = from;
        r->lengths[r->count] = l->inputs;
        r->outside[r->count] = outside;
        r->count++;
    }
}

/* Copies numbers to a column, in the width that is added up; writes up to 15 more. */
static void put_column(uint8_t *restrict to, const uint8_t *restrict from, unsigned count,
                       uint8_t type, int narrow)
{
    const unsigned size = size_of(type);
    unsigned i, j;
    if (narrow) {
        const uint8_t flip = type == INT8 ? 128 : 0;
        for (i = 0; i < count; i += LANES)
            for (j = 0; j < LANES; j++)
                to[i + j] = from[i + j] ^ flip;
    } else {
        for (i = 0; i < count; i += LANES)
            widen((int16_t *)(void *)to + i, from + i * size, type);
    }
}

static void put_columns(const readers *r, const layer *l, uint8_t *to, unsigned pixel, int narrow)
{
    const unsigned bytes = l->inputs * size_of(l->input_type), item = narrow ? 1 : 2;
    const size_t offset = (pixel - r->start) * l->across;
    unsigned i;
    if (l->kind == SHIFTED) {
        for (i = 0; i < bytes; i += 16)
            choose(moved + i, r->from, r->masks, r->count, offset + i, i);
        put_column(to, moved, l->inputs, l->input_type, narrow);
    } else {
        for (i = 0; i < r->count; to += r->lengths[i] * item, i++)
            put_column(to, r->from[i] + (r->outside[i] ? 0 : offset), r->lengths[i], l->input_type,
                       narrow);
    }
}

/* One row of sums over all channels of the input, brought to codes. */
static void dense_row(const layer *l, const form *f, const uint8_t *const *rows, uint8_t *out)
{
    const int narrow = f->run != 0;
    const unsigned column = (f->depth + 3) / 4 * 4 * (narrow ? 1 : 2), size = size_of(l->type);
    /* The inputs of a 1x1 convolution are columns as they are. */
    const int direct = l->kind == SUMS && l->tap_count == 1 && narrow && l->input_type == UINT8
                       && l->inputs % 4 == 0;
    unsigned first, p, o;
    readers r;
    r.end = 0;
    for (first = 0; first < l->width; first += PIXELS) {
        const unsigned count = smaller(PIXELS, l->width - first);
        const uint8_t *x = columns;
        unsigned pixel = column;
        if (direct && count == PIXELS) {
            x = rows[0] + first * l->across;
            pixel = l->across;
        } else {
            for (p = 0; p < count; p++) {
                if (first + p >= r.end)
                    find_readers(&r, l, f, rows, first + p);
                put_columns(&r, l, columns + p * column, first + p, narrow);
            }
        }
        for (o = 0; o < l->channels; o += LANES) {
            const uint8_t *w = f->weights + o / LANES * f->bytes;
            int32_t sum[PIXELS][LANES] ALIGNED;
            if (narrow)
                narrow_sums(sum, x, pixel, w, f->steps, f->run);
            else
                wide_sums(sum, x, pixel, w, f->steps);
            for (p = 0; p < count; p++)
                finish_some(out + (first + p) * l->pixel + o * size, sum[p], f->blocks + o / LANES,
                            l, smaller(LANES, l->channels - o));
        }
    }
}

/* One row of sums over each channel of the input by itself, brought to codes. */
static void each_row(const layer *l, const form *f, const uint8_t *const *rows, uint8_t *out)
{
    const unsigned size = size_of(l->type);
    unsigned p, o, t, i;
    readers r;
    r.end = 0;
    for (p = 0; p < l->width; p++) {
        size_t offset;
        if (p >= r.end)
            find_readers(&r, l, f, rows, p);
        offset = (p - r.start) * l->across;
        for (o = 0; o < l->channels; o += LANES) {
            const int16_t *w = (const int16_t *)(void *)(f->weights + o / LANES * f->bytes);
            int32_t sum[LANES] = {0};
            for (t = 0; t < r.count; t++) {
                int16_t x[LANES];
                if (r.outside[t])
                    continue;
                widen(x, r.from[t] + offset + o * l->channel, l->input_type);
                if (l->weights != 0)
                    for (i = 0; i < LANES; i++)
                        sum[i] += x[i] * w[t * LANES + i];
                else
                    for (i = 0; i < LANES; i++)
                        sum[i] += x[i];
            }
            finish_some(out + p * l->pixel + o * size, sum, f->blocks + o / LANES, l,
                        smaller(LANES, l->channels - o));
        }
    }
}

/* Sums of products for one row of all channels, brought to codes. */
static void sums_row(const layer *l, const uint8_t *const *rows, uint8_t *out)
{
    const form f = form_of(l);
    if (l->channel != 0)
        each_row(l, &f, rows, out);
    else
        dense_row(l, &f, rows, out);
}

/* One row of a sum; the second summand can have fewer channels. */
static void sum_row(const layer *l, const uint8_t *a, const uint8_t *b, const layer *of_a,
                    const layer *of_b, uint8_t *out)
{
    const unsigned size = size_of(l->type);
    const unsigned a_size = size_of(of_a->type), b_size = size_of(of_b->type);
    const int same = of_a->channels == of_b->channels;
    const unsigned channels = same ? (unsigned)l->channels * l->width : l->channels;
    const unsigned b_channels = same ? channels : of_b->channels;
    const uint8_t *end = out + l->row;
    unsigned c;
    for (; out != end; a += channels * a_size, b += b_channels * b_size, out += channels * size)
        for (c = 0; c < channels; c += LANES) {
            const unsigned count = smaller(LANES, channels - c);
            const unsigned of_them = c < b_channels ? smaller(LANES, b_channels - c) : 0;
            const uint8_t *y = b + c * b_size;
            uint8_t some[LANES * 2] = {0}, codes[LANES * 4];
            if (of_them < count) {
                memcpy(some, y, of_them * b_size);
                y = some;
            }
            if (count == LANES) {
                add(out + c * size, a + c * a_size, of_a->type, y, of_b->type, l);
            } else {
                add(codes, a + c * a_size, of_a->type, y, of_b->type, l);
                memcpy(out + c * size, codes, count * size);
            }
        }
}
