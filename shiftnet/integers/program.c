/* This program is portable, and only adds and shifts. Where the compiler may use AVX2 (-mavx2) or
   64-bit Arm's NEON it multiplies with these instead, and computes the same integers;
   -DNET_PORTABLE prevents that. */
#if !defined(NET_PORTABLE) && (defined(__AVX2__) || (defined(__ARM_NEON) && defined(__aarch64__)))
#define NET_SIMD
/* Bytes before and after what buffers hold: whole vectors are read, and shifts past a row's ends. */
#define NET_MARGIN ((NET_REACH + 319) / 64 * 64)
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif
#else
#define NET_MARGIN 0
#endif

typedef struct {
    uint8_t row;     /* of the rows that the layer reads */
    uint8_t first;   /* the first pixel of the result that it adds to, and how many */
    uint16_t count;
    int32_t offset;  /* bytes from the start of its row to what that pixel reads */
} tap;

typedef struct {
    const uint8_t *weights;     /* indices of levels, packed; none: each weight is 1 */
    const int16_t *levels;      /* none: weights are two's complement numbers of 8 bits */
    const int16_t *multiplier;  /* of each channel, as are the next two; two for a sum */
    const int32_t *bias;
    const uint8_t *shift;
    const tap *taps;
    const uint8_t *directions;  /* the tap of each channel; none: one tap after the other */
    int32_t low, high;
    uint32_t base, bytes, row;  /* of the buffer: its first byte, its size, that of a row */
    uint16_t height, width, channels;
    uint16_t inputs;            /* channels that a channel reads */
    uint16_t pixel;             /* bytes of a pixel of the result */
    uint16_t across;            /* bytes between what two neighbours of the result read */
    uint16_t channel;           /* bytes between what two channels of the result read, */
    uint16_t run, wrap;         /* after `run` channels that read the same; back to 0 at `wrap` */
    uint16_t moved, centre;     /* channels that a shift moves; the tap of the others */
    uint16_t tap_count;
    uint8_t kind, type, input_type, bits, window, padding, stride;
    uint8_t sources;
    uint8_t source[2];
} layer;

enum { TABLE, SUMS, SHIFTED, ADD };
enum { INT8, UINT8, INT16, INT32 };

/* The order of bits that all compilers of today use, and that the C standard leaves open. */
typedef char right_shifts_keep_the_sign[(-2 >> 1) == -1 ? 1 : -1];

static int16_t memory[(NET_MEMORY + 2 * NET_MARGIN) / 2];
static uint8_t *next_row[NET_LAYERS];
static uint16_t rows_done[NET_LAYERS];
static const uint8_t *window_start[NET_LAYERS][2]; /* the first row that exists of a window */
static int16_t window_top[NET_LAYERS];              /* the number of its first row */
static const uint8_t *next_image_row;

static unsigned size_of(uint8_t type)
{
    return type < INT16 ? 1 : type == INT16 ? 2 : 4;
}

typedef struct {
    const uint8_t *next;
    uint32_t held;
    uint8_t count;
} weight_reader;

static int next_weight(weight_reader *r, const layer *l)
{
    int code;
    if (l->weights == 0)
        return 1;
    while (r->count < l->bits) {
        r->held |= (uint32_t)*r->next++ << r->count;
        r->count = (uint8_t)(r->count + 8);
    }
    code = (int)(r->held & ((1u << l->bits) - 1));
    r->held >>= l->bits;
    r->count = (uint8_t)(r->count - l->bits);
    return l->levels ? l->levels[code] : (code ^ 128) - 128;
}

/* One row of a table's codes. */
static void table_row(const layer *l, uint8_t *out)
{
    uint16_t i, c;
    for (i = 0; i < l->width; i++) {
        const uint8_t *table = l->weights;
        for (c = 0; c < l->channels; c++, table += 256)
            *out++ = table[*next_image_row++];
    }
}

#ifndef NET_SIMD
static uint32_t sums[NET_WIDEST];

static int32_t load(const uint8_t *from, uint8_t type)
{
    switch (type) {
    case INT8:
        return *(const int8_t *)from;
    case UINT8:
        return *from;
    default:
        return *(const int16_t *)(const void *)from;
    }
}

static void store(uint8_t *to, uint8_t type, int32_t value)
{
    switch (type) {
    case INT8:
    case UINT8:
        *to = (uint8_t)value;
        break;
    case INT16:
        *(int16_t *)(void *)to = (int16_t)value;
        break;
    default:
        *(int32_t *)(void *)to = value;
    }
}

/* A multiplier, as the powers of two that it is the sum of. */
typedef struct {
#if NET_MULTIPLIES
    uint32_t value;
#else
    uint8_t count;
    uint8_t place[9];
    uint8_t negative[9];
#endif
} factor;

/* The next digit of a number as a sum of signed powers of two, the lowest first: 1 or -1 if the
   last bit is set. The number without it is even. */
static int digit(int number)
{
    return (number & 1) ? 2 - (number & 3) : 0;
}

static factor make_factor(int multiplier)
{
    factor f;
#if NET_MULTIPLIES
    f.value = (uint32_t)multiplier;
#else
    uint8_t place;
    f.count = 0;
    for (place = 0; multiplier != 0; place++, multiplier >>= 1) {
        int d = digit(multiplier);
        if (d != 0) {
            f.place[f.count] = place;
            f.negative[f.count] = d < 0;
            f.count++;
            multiplier -= d;
        }
    }
#endif
    return f;
}

static uint32_t times(uint32_t value, const factor *f)
{
#if NET_MULTIPLIES
    return value * f->value;
#else
    uint32_t total = 0;
    uint8_t i;
    for (i = 0; i < f->count; i++) {
        uint32_t term = value << f->place[i];
        total = f->negative[i] ? total - term : total + term;
    }
    return total;
#endif
}

static int32_t finished(uint32_t value, uint8_t shift, const layer *l)
{
    int32_t code = (int32_t)value >> shift;
    return code < l->low ? l->low : code > l->high ? l->high : code;
}

/* Adds or subtracts `count` numbers, times a power of two. */
#define ADD_ROW(type)                                                     \
    do {                                                                  \
        for (; count != 0; count--, to++, x += across) {                  \
            uint32_t value = (uint32_t)(int32_t)*(const type *)(const void *)x << place; \
            *to = negative ? *to - value : *to + value;                   \
        }                                                                 \
    } while (0)

static void add_row(uint32_t *to, const uint8_t *x, const layer *l, unsigned count, int place,
                    int negative)
{
    const unsigned across = l->across;
    switch (l->input_type) {
    case INT8:
        ADD_ROW(int8_t);
        break;
    case UINT8:
        ADD_ROW(uint8_t);
        break;
    default:
        ADD_ROW(int16_t);
    }
}

/* Adds a weight times what a tap reads, for the pixels of a row. */
static void add_tap(const uint8_t *const *rows, const layer *l, const tap *t, uint32_t channel,
                    int weight)
{
    int place;
    if (rows[t->row] == 0)
        return;
    for (place = 0; weight != 0; place++, weight >>= 1) {
        int d = digit(weight);
        if (d != 0) {
            add_row(sums + t->first, rows[t->row] + t->offset + channel, l, t->count, place, d < 0);
            weight -= d;
        }
    }
}

/* Sums of products for one row of all channels, brought to codes. */
static void sums_row(const layer *l, const uint8_t *const *rows, uint8_t *out)
{
    const unsigned size = size_of(l->input_type), out_size = size_of(l->type);
    weight_reader reader;
    uint32_t channel = 0;
    uint16_t o, c, i, alike = 0;
    reader.next = l->weights;
    reader.held = 0;
    reader.count = 0;
    for (o = 0; o < l->channels; o++, out += out_size) {
        const factor f = make_factor(l->multiplier[o]);
        const uint32_t bias = (uint32_t)l->bias[o];
        uint8_t *to = out;
        uint32_t at = channel;
        for (i = 0; i < l->width; i++)
            sums[i] = 0;
        if (l->kind == SHIFTED) {
            uint16_t direction = 0;
            for (c = 0; c < l->inputs; c++, at += size) {
                const tap *t = l->taps + (l->directions    ? l->directions[c]
                                          : c < l->moved ? direction
                                                         : l->centre);
                add_tap(rows, l, t, at, next_weight(&reader, l));
                if (++direction == l->tap_count)
                    direction = 0;
            }
        } else {
            for (i = 0; i < l->tap_count; i++)
                for (c = 0, at = channel; c < l->inputs; c++, at += size)
                    add_tap(rows, l, l->taps + i, at, next_weight(&reader, l));
        }
        for (i = 0; i < l->width; i++, to += l->pixel)
            store(to, l->type, finished(times(sums[i], &f) + bias, l->shift[o], l));
        if (++alike == l->run) {
            alike = 0;
            channel += l->channel;
            if (channel == l->wrap)
                channel = 0;
        }
    }
}

/* One row of a sum; the second summand can have fewer channels. */
static void sum_row(const layer *l, const uint8_t *a, const uint8_t *b, const layer *of_a,
                    const layer *of_b, uint8_t *out)
{
    const factor by_a = make_factor(l->multiplier[0]), by_b = make_factor(l->multiplier[1]);
    const uint8_t a_type = of_a->type, b_type = of_b->type;
    const unsigned out_size = size_of(l->type), a_size = size_of(a_type), b_size = size_of(b_type);
    const uint8_t *end = out + l->row;
    uint16_t c = 0;
    for (; out != end; a += a_size, out += out_size) {
        uint32_t total = times((uint32_t)load(a, a_type), &by_a) + (uint32_t)l->bias[0];
        if (c < of_b->channels) {
            total += times((uint32_t)load(b, b_type), &by_b);
            b += b_size;
        }
        store(out, l->type, finished(total, l->shift[0], l));
        if (++c == l->channels)
            c = 0;
    }
}
#else
@SIMD@
#endif

static uint8_t *start_of(const layer *l)
{
    return (uint8_t *)memory + NET_MARGIN + l->base;
}

/* The row after this one; after the last of a buffer comes its first. */
static uint8_t *row_after(const layer *l, const uint8_t *row)
{
    const uint8_t *after = row + l->row;
    return (uint8_t *)memory + ((after == start_of(l) + l->bytes ? start_of(l) : after)
                                - (const uint8_t *)memory);
}

/* Computes the next row of a layer. */
static void compute_row(uint8_t number)
{
    const layer *l = &layers[number];
    const uint8_t *rows[2][NET_WINDOW];
    uint8_t s, j;
    int16_t row;
    for (s = 0; s < l->sources; s++) {
        const layer *from = &layers[l->source[s]];
        const uint8_t *at = window_start[number][s];
        for (j = 0, row = window_top[number]; j < l->window; j++, row++) {
            rows[s][j] = 0;
            if (row >= 0 && row < (int16_t)from->height) {
                rows[s][j] = at;
                at = row_after(from, at);
            }
        }
    }
    if (l->kind == TABLE) {
        table_row(l, next_row[number]);
    } else if (l->kind == ADD) {
        const layer *a = &layers[l->source[0]], *b = &layers[l->source[1]];
        sum_row(l, rows[0][0], rows[1][0], a, b, next_row[number]);
    } else {
        sums_row(l, rows[0], next_row[number]);
    }
    rows_done[number]++;
    if (rows_done[number] == l->height)
        return;
    next_row[number] = row_after(l, next_row[number]);
    for (j = 0; j < 1u << l->stride; j++, window_top[number]++)
        if (window_top[number] >= 0)
            for (s = 0; s < l->sources; s++)
                window_start[number][s] =
                    row_after(&layers[l->source[s]], window_start[number][s]);
}

/* Computes the layers of a segment, see its memory in the plan: row by row of the last one. */
static void compute_segment(uint8_t first, uint8_t last)
{
    uint16_t target[NET_LAYERS];
    uint16_t row;
    uint8_t i, s;
    for (row = 1; row <= layers[last].height; row++) {
        for (i = first; i < last; i++)
            target[i] = 0;
        target[last] = row;
        for (i = (uint8_t)(last + 1); i-- > first;) {
            const layer *l = &layers[i];
            int32_t needed;
            if (target[i] <= rows_done[i])
                continue;
            needed = ((int32_t)(target[i] - 1) << l->stride) - l->padding + l->window;
            for (s = 0; s < l->sources; s++) {
                uint16_t height = layers[l->source[s]].height;
                uint16_t upto = needed < height ? (uint16_t)needed : height;
                if (l->source[s] >= first && target[l->source[s]] < upto)
                    target[l->source[s]] = upto;
            }
        }
        for (i = first; i <= last; i++)
            while (rows_done[i] < target[i])
                compute_row(i);
    }
}

void net_run(const uint8_t *image, int32_t *logits)
{
    uint8_t i, s, first = 0;
#ifdef NET_SIMD
    if (forms[NET_LAYERS - 1].weights == 0)
        unpack_all();
#endif
    next_image_row = image;
    for (i = 0; i < NET_LAYERS; i++) {
        next_row[i] = start_of(&layers[i]);
        rows_done[i] = 0;
        window_top[i] = (int16_t)-layers[i].padding;
        for (s = 0; s < layers[i].sources; s++)
            window_start[i][s] = start_of(&layers[layers[i].source[s]]);
    }
    next_row[NET_LAYERS - 1] = (uint8_t *)logits;
    for (i = 0; i < NET_SEGMENTS; i++) {
        compute_segment(first, segments[i]);
        first = (uint8_t)(segments[i] + 1);
    }
}
