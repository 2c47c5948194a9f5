/* The same rows for 4 pixels and 16 channels at a time, with the processor's multiplications. The
   integers are those of the code above, which defines them. The weights of a segment are unpacked
   before it, in blocks of 16 channels:

       weights[block][step][channel in the block][number in the step]

   A step reads 4 bytes of each pixel's input with AVX2: 4 numbers of 8 bits where the sums of some
   steps fit in 16 bits ("narrow"), else 2 numbers of 16 bits; with NEON one number of 16 bits. */
enum { LANES = 16, PIXELS = 4 };

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
static uint8_t columns[PIXELS * NET_DEEPEST * 2] ALIGNED; /* what the sums of 4 pixels read */
static uint8_t moved[NET_DEEPEST * 2] ALIGNED;            /* a pixel of a shift's result */
static uint8_t nothing[NET_DEEPEST * 2] ALIGNED;          /* a pixel outside of the image */

static unsigned smaller(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

#ifdef __AVX2__

static __m256i four_bytes(const uint8_t *x)
{
    int32_t word;
    memcpy(&word, x, 4);
    return _mm256_set1_epi32(word);
}

static __m256i *at(int32_t *x)
{
    return (__m256i *)(void *)x;
}

static __m256i vector(const void *x)
{
    return _mm256_load_si256((const __m256i *)x);
}

/* Sums of unsigned inputs times signed weights of 8 bits; up to `run` steps fit in 16 bits. */
static void narrow_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                        const uint8_t *w, unsigned steps, unsigned run)
{
    const uint8_t *x1 = x + pixel, *x2 = x1 + pixel, *x3 = x2 + pixel;
    const __m256i ones = _mm256_set1_epi16(1);
    unsigned done, p;
    for (done = 0; done < steps;) {
        const unsigned end = smaller(steps, done + run);
        const int first = done == 0;
        __m256i s[PIXELS][2];
        for (p = 0; p < PIXELS; p++)
            s[p][0] = s[p][1] = _mm256_setzero_si256();
        for (; done < end; done++, w += 64, x += 4, x1 += 4, x2 += 4, x3 += 4) {
            const __m256i w0 = vector(w), w1 = vector(w + 32);
#define ADD_PIXEL(p, from)                                                              \
    do {                                                                                \
        const __m256i bytes = four_bytes(from);                                         \
        s[p][0] = _mm256_add_epi16(s[p][0], _mm256_maddubs_epi16(bytes, w0));           \
        s[p][1] = _mm256_add_epi16(s[p][1], _mm256_maddubs_epi16(bytes, w1));           \
    } while (0)
            ADD_PIXEL(0, x);
            ADD_PIXEL(1, x1);
            ADD_PIXEL(2, x2);
            ADD_PIXEL(3, x3);
#undef ADD_PIXEL
        }
        for (p = 0; p < PIXELS; p++) {
            __m256i a = _mm256_madd_epi16(s[p][0], ones), b = _mm256_madd_epi16(s[p][1], ones);
            if (!first) {
                a = _mm256_add_epi32(a, *at(to[p]));
                b = _mm256_add_epi32(b, *at(to[p] + 8));
            }
            *at(to[p]) = a;
            *at(to[p] + 8) = b;
        }
    }
}

static void wide_sums(int32_t to[PIXELS][LANES], const uint8_t *x, unsigned pixel,
                      const uint8_t *w, unsigned steps)
{
    const uint8_t *x1 = x + pixel, *x2 = x1 + pixel, *x3 = x2 + pixel;
    __m256i s[PIXELS][2];
    unsigned p;
    for (p = 0; p < PIXELS; p++)
        s[p][0] = s[p][1] = _mm256_setzero_si256();
    for (; steps != 0; steps--, w += 64, x += 4, x1 += 4, x2 += 4, x3 += 4) {
        const __m256i w0 = vector(w), w1 = vector(w + 32);
#define ADD_PIXEL(p, from)                                                              \
    do {                                                                                \
        const __m256i pair = four_bytes(from);                                          \
        s[p][0] = _mm256_add_epi32(s[p][0], _mm256_madd_epi16(pair, w0));               \
        s[p][1] = _mm256_add_epi32(s[p][1], _mm256_madd_epi16(pair, w1));               \
    } while (0)
        ADD_PIXEL(0, x);
        ADD_PIXEL(1, x1);
        ADD_PIXEL(2, x2);
        ADD_PIXEL(3, x3);
#undef ADD_PIXEL
    }
    for (p = 0; p < PIXELS; p++) {
        *at(to[p]) = s[p][0];
        *at(to[p] + 8) = s[p][1];
    }
}

/* 16 bytes of each of several places, of which the masks choose. */
static void choose(uint8_t *to, const uint8_t *const *from, const uint8_t *masks, unsigned count,
                   unsigned apart, unsigned offset)
{
    __m128i chosen = _mm_setzero_si128();
    unsigned t;
    for (t = 0; t < count; t++, masks += apart)
        chosen = _mm_or_si128(
            chosen, _mm_and_si128(_mm_loadu_si128((const __m128i *)(const void *)masks),
                                  _mm_loadu_si128((const __m128i *)(const void *)(from[t] + offset))));
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
    for (; steps != 0; steps--, w += 32, from++) {
        const int16x8_t w0 = vld1q_s16((const int16_t *)(const void *)w);
        const int16x8_t w1 = vld1q_s16((const int16_t *)(const void *)(w + 16));
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

static void choose(uint8_t *to, const uint8_t *const *from, const uint8_t *masks, unsigned count,
                   unsigned apart, unsigned offset)
{
    uint8x16_t chosen = vdupq_n_u8(0);
    unsigned t;
    for (t = 0; t < count; t++, masks += apart)
        chosen = vorrq_u8(chosen, vandq_u8(vld1q_u8(masks), vld1q_u8(from[t] + offset)));
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
    unsigned i, j;
    if (l->channel != 0) {
        for (i = 0; i < f->depth; i++)
            memcpy(to + (i * LANES + lane) * 2, from + i, 2);
    } else if (f->run == 0) {
        to += lane * WIDE_STEP * 2;
        for (i = 0; i < f->steps; i++, from += WIDE_STEP, to += LANES * WIDE_STEP * 2)
            memcpy(to, from, WIDE_STEP * 2);
    } else {
        to += lane * 4;
        for (i = 0; i < f->steps; i++, from += 4, to += LANES * 4)
            for (j = 0; j < 4; j++) {
                to[j] = (uint8_t)from[j];
                total += (uint32_t)from[j];
            }
    }
    return total;
}

static void unpack(const layer *l)
{
    const form f = form_of(l);
    weight_reader reader = {0, 0, 0};
    unsigned o, c;
    reader.next = l->weights;
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
            const unsigned t = c < l->moved ? direction : l->centre;
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

/* Reads up to 16 numbers; the others are 0. */
static void load_some(int16_t *restrict to, const uint8_t *restrict from, uint8_t type,
                      unsigned count)
{
    unsigned i;
    if (count < LANES) {
        for (i = 0; i < LANES; i++)
            to[i] = (int16_t)(i < count ? load(from + i * size_of(type), type) : 0);
    } else if (type == INT8) {
        for (i = 0; i < LANES; i++)
            to[i] = (int8_t)from[i];
    } else if (type == UINT8) {
        for (i = 0; i < LANES; i++)
            to[i] = from[i];
    } else {
        memcpy(to, from, LANES * 2);
    }
}

static void store_some(uint8_t *restrict to, const int32_t *restrict from, const layer *l,
                       unsigned count)
{
    const uint8_t type = l->type;
    const int32_t low = l->low, high = l->high;
    int32_t codes[LANES];
    int16_t halves[LANES];
    unsigned i;
    for (i = 0; i < LANES; i++) {
        const int32_t code = from[i] < low ? low : from[i];
        codes[i] = code > high ? high : code;
        halves[i] = (int16_t)codes[i];
    }
    if (count < LANES) {
        for (i = 0; i < count; i++)
            store(to + i * size_of(type), type, codes[i]);
    } else if (type < INT16) {
        for (i = 0; i < LANES; i++)
            to[i] = (uint8_t)codes[i];
    } else if (type == INT16) {
        memcpy(to, halves, sizeof halves);
    } else {
        memcpy(to, codes, sizeof codes);
    }
}

/* Brings sums to codes. */
static void finish_some(uint8_t *to, const int32_t *restrict from, const block *restrict b,
                        const layer *l, unsigned count)
{
    int32_t values[LANES];
    unsigned i;
    for (i = 0; i < LANES; i++)
        values[i] = (int32_t)((uint32_t)from[i] * (uint32_t)b->multiplier[i] + (uint32_t)b->bias[i])
                    >> b->shift[i];
    store_some(to, values, l, count);
}

/* What a tap of a pixel reads. */
static const uint8_t *read_by(const tap *t, const layer *l, const uint8_t *const *rows,
                              unsigned pixel)
{
    if (rows[t->row] == 0 || pixel < t->first || pixel >= (unsigned)t->first + t->count)
        return nothing;
    return rows[t->row] + t->offset + (pixel - t->first) * l->across;
}

/* Copies numbers to a column, in the width that is added up. */
static void put_column(uint8_t *restrict to, const uint8_t *restrict from, unsigned count,
                       uint8_t type, int narrow)
{
    unsigned i;
    if (narrow) {
        const uint8_t flip = type == INT8 ? 128 : 0;
        for (i = 0; i < count; i++)
            to[i] = from[i] ^ flip;
    } else {
        int16_t *restrict wide = (int16_t *)(void *)to;
        if (type == INT8)
            for (i = 0; i < count; i++)
                wide[i] = (int8_t)from[i];
        else if (type == UINT8)
            for (i = 0; i < count; i++)
                wide[i] = from[i];
        else
            memcpy(to, from, count * 2);
    }
}

/* A pixel of a shift's result. */
static void shift_pixel(const layer *l, const form *f, const uint8_t *const *rows, unsigned pixel)
{
    const uint8_t *from[NET_TAPS];
    const unsigned bytes = l->inputs * size_of(l->input_type);
    unsigned t, i;
    for (t = 0; t < l->tap_count; t++)
        from[t] = read_by(l->taps + t, l, rows, pixel);
    for (i = 0; i + 16 <= bytes; i += 16)
        choose(moved + i, from, f->masks + i, l->tap_count, bytes, i);
    for (; i < bytes; i++)
        for (t = 0, moved[i] = 0; t < l->tap_count; t++)
            moved[i] |= f->masks[t * bytes + i] & from[t][i];
}

/* One row of sums over all channels of the input, brought to codes. */
static void dense_row(const layer *l, const form *f, const uint8_t *const *rows, uint8_t *out)
{
    const int narrow = f->run != 0;
    const unsigned item = narrow ? 1 : 2, column = (f->depth + 3) / 4 * 4 * item;
    const unsigned size = size_of(l->type);
    /* The inputs of a 1x1 convolution are columns as they are. */
    const int direct = l->kind == SUMS && l->tap_count == 1 && narrow && l->input_type == UINT8
                       && l->inputs % 4 == 0;
    unsigned first, p, o, t;
    for (first = 0; first < l->width; first += PIXELS) {
        const unsigned count = smaller(PIXELS, l->width - first);
        const uint8_t *x = columns;
        unsigned pixel = column;
        if (direct && count == PIXELS) {
            x = read_by(l->taps, l, rows, first);
            pixel = l->across;
        } else {
            for (p = 0; p < count; p++) {
                uint8_t *to = columns + p * column;
                if (l->kind == SHIFTED) {
                    shift_pixel(l, f, rows, first + p);
                    put_column(to, moved, l->inputs, l->input_type, narrow);
                } else {
                    for (t = 0; t < l->tap_count; t++, to += l->inputs * item)
                        put_column(to, read_by(l->taps + t, l, rows, first + p), l->inputs,
                                   l->input_type, narrow);
                }
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
    for (p = 0; p < l->width; p++)
        for (o = 0; o < l->channels; o += LANES) {
            const unsigned count = smaller(LANES, l->channels - o);
            const uint8_t *weights = f->weights + o / LANES * f->bytes;
            int32_t sum[LANES] = {0};
            for (t = 0; t < l->tap_count; t++) {
                int16_t x[LANES], w[LANES];
                load_some(x, read_by(l->taps + t, l, rows, p) + o * l->channel, l->input_type, count);
                if (l->weights != 0)
                    memcpy(w, weights + t * LANES * 2, sizeof w);
                for (i = 0; i < LANES; i++)
                    sum[i] += l->weights != 0 ? x[i] * w[i] : x[i];
            }
            finish_some(out + p * l->pixel + o * size, sum, f->blocks + o / LANES, l, count);
        }
}

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
    const int32_t by_a = l->multiplier[0], by_b = l->multiplier[1], bias = l->bias[0];
    const unsigned shift = l->shift[0];
    const unsigned size = size_of(l->type), a_size = size_of(of_a->type), b_size = size_of(of_b->type);
    const int same = of_a->channels == of_b->channels;
    const unsigned channels = same ? (unsigned)l->channels * l->width : l->channels;
    const unsigned b_channels = same ? channels : of_b->channels;
    const uint8_t *end = out + l->row;
    unsigned c, i;
    for (; out != end; a += channels * a_size, b += b_channels * b_size, out += channels * size)
        for (c = 0; c < channels; c += LANES) {
            const unsigned count = smaller(LANES, channels - c);
            int16_t x[LANES], y[LANES] = {0};
            int32_t values[LANES];
            load_some(x, a + c * a_size, of_a->type, count);
            if (c < b_channels)
                load_some(y, b + c * b_size, of_b->type, smaller(LANES, b_channels - c));
            for (i = 0; i < LANES; i++)
                values[i] = (x[i] * by_a + y[i] * by_b + bias) >> shift;
            store_some(out + c * size, values, l, count);
        }
}
