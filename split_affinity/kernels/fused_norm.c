/* Batch normalisation in training, with the addition and the ReLU that often follow: one operator.
 *
 * PyTorch runs the three one after the other. Each reads and writes whole activations, which fit into
 * no cache. Here the forward pass reads its input twice and writes its output once. The backward pass
 * needs no more. All arithmetic is in float32; activations are bfloat16 or float32.
 *
 * An activation is a matrix of rows (image, y, x) and channels, as in PyTorch's channels_last. Each
 * thread has a part of the rows, and sums of its own. These are added in order, so that equal numbers
 * of threads give equal bits. The vector types are those of gcc and clang, which know every CPU.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* Channels in a vector, as long as the CPU's own: gcc takes longer ones apart. */
#if defined(__AVX512F__)
enum { WIDTH = 16 };
#elif defined(__AVX__)
enum { WIDTH = 8 };
#else
enum { WIDTH = 4 };
#endif

/* Rows that share what is loaded for their channels; tiles that are added up in float32 before their
 * sum goes into a double; rows that the shift is the mean of. */
enum { TILE = 4, TILES_IN_FLOAT = 256, SHIFT_ROWS = 16 };

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))

/* What gcc makes of `#pragma omp parallel`. Called by name, it takes the OpenMP that PyTorch has
 * loaded, and the threads that it has started; clang's pragma would want another one. */
void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

/* One call. Activations are matrices, all else arrays of one float for each channel. */
struct norm {
    int64_t rows, channels; /* at least WIDTH channels */
    int64_t parts;          /* as many as threads */
    int64_t bf16;           /* activations are bfloat16 */
    int64_t relu;
    double eps, momentum;
    const float *weight, *bias;        /* NULL: 1 and 0 */
    float *running_mean, *running_var; /* NULL: not kept */
    float *mean, *inverse_std;         /* of the batch */
    const void *x, *residual;          /* residual NULL: none is added */
    void *y;
    const void *dy, *dy2;              /* dy2 NULL: the output has one consumer */
    void *dz;                          /* the gradient in front of the ReLU, that of residual; NULL
                                          without residual and dy2 */
    void *dx;
    float *dweight, *dbias;
    char *room;                        /* fused_norm_room bytes */
};

INLINE floats load_floats(const float *from) {
    floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store_floats(float *to, floats value) { memcpy(to, &value, sizeof value); }

INLINE floats load(const void *matrix, int64_t index, int bf16) {
    if (!bf16)
        return load_floats((const float *)matrix + index);
    halves half;
    memcpy(&half, (const uint16_t *)matrix + index, sizeof half);
    return (floats)(__builtin_convertvector(half, words) << 16);
}

/* Rounds to the nearest, ties to even, as PyTorch does. */
INLINE void store(void *matrix, int64_t index, floats value, int bf16) {
    if (!bf16) {
        store_floats((float *)matrix + index, value);
        return;
    }
#ifdef __AVX512BF16__
    halves half = (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    words word = (words)value, is_nan = (words)(value != value);
    words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    halves half = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), halves);
#endif
    memcpy((uint16_t *)matrix + index, &half, sizeof half);
}

/* A NaN stays one. */
INLINE floats clip(floats value) { return (floats)(~(value < 0) & (ints)value); }

INLINE floats where(ints condition, floats value) { return (floats)(condition & (ints)value); }

/* Channels come in blocks of WIDTH, each with sums of its own. The last block begins early enough to
 * be full: some of its channels are computed twice, and their sums in the block before are used. */
INLINE int64_t blocks_of(const struct norm *job) { return (job->channels + WIDTH - 1) / WIDTH; }

INLINE int64_t first_channel(const struct norm *job, int64_t block) {
    int64_t last = job->channels - WIDTH;
    return block * WIDTH < last ? block * WIDTH : last;
}

INLINE int64_t slot_of(const struct norm *job, int64_t channel) {
    int64_t block = channel / WIDTH;
    return block * WIDTH + channel - first_channel(job, block);
}

/* What a part adds up, in float32 at first. There are two sums for each slot. */
struct sums {
    double *total, *total2;
    float *sum, *sum2, *shift;
};

INLINE struct sums sums_of(const struct norm *job, int64_t part) {
    int64_t slots = blocks_of(job) * WIDTH;
    char *room = job->room + part * slots * (2 * sizeof(double) + 3 * sizeof(float));
    double *totals = (double *)room;
    float *sums = (float *)(totals + 2 * slots);
    return (struct sums){totals, totals + slots, sums, sums + slots, sums + 2 * slots};
}

/* Of each channel, behind the sums of all parts: two means of the backward pass. */
INLINE float *means_of(const struct norm *job) { return (float *)sums_of(job, job->parts).total; }

int64_t fused_norm_room(int64_t channels, int64_t parts) {
    int64_t slots = (channels + WIDTH - 1) / WIDTH * WIDTH;
    return (parts * (2 * sizeof(double) + 3 * sizeof(float)) + 2 * sizeof(float)) * slots;
}

INLINE void clear_floats(const struct norm *job, struct sums sums) {
    size_t bytes = sizeof(float) * (size_t)(blocks_of(job) * WIDTH);
    memset(sums.sum, 0, bytes);
    memset(sums.sum2, 0, bytes);
}

INLINE void clear(const struct norm *job, struct sums sums) {
    memset(sums.total, 0, 2 * sizeof(double) * (size_t)(blocks_of(job) * WIDTH));
    clear_floats(job, sums);
}

INLINE void add_to_totals(const struct norm *job, struct sums sums) {
    for (int64_t slot = 0; slot < blocks_of(job) * WIDTH; slot++) {
        sums.total[slot] += sums.sum[slot];
        sums.total2[slot] += sums.sum2[slot];
    }
    clear_floats(job, sums);
}

typedef void (*part_function)(struct norm *job, int64_t part);

struct team {
    part_function run;
    struct norm *job;
};

static void run_thread(void *data) {
    const struct team *team = data;
    /* There may be fewer threads than parts. */
    for (int64_t part = omp_get_thread_num(); part < team->job->parts; part += omp_get_num_threads())
        team->run(team->job, part);
}

static void run_parts(part_function run, struct norm *job) {
    struct team team = {run, job};
    GOMP_parallel(run_thread, &team, (unsigned)job->parts, 0);
}

INLINE floats scale_of(const struct norm *job, int64_t channel) {
    floats scale = load_floats(job->inverse_std + channel);
    return job->weight ? scale * load_floats(job->weight + channel) : scale;
}

/* The normalised value; forward and backward pass have the very same bits. */
INLINE floats normalised(const struct norm *job, int64_t channel, floats centred) {
    floats value = centred * scale_of(job, channel);
    return job->bias ? value + load_floats(job->bias + channel) : value;
}

INLINE int64_t first_of(int64_t count, const struct norm *job, int64_t part) {
    return count * part / job->parts;
}

/* -- Forward ---------------------------------------------------------------------------------- */

/* A value near the mean: differences from it keep their digits when squared. */
INLINE floats shift_of(const struct norm *job, int64_t channel, int bf16) {
    int64_t used = job->rows < SHIFT_ROWS ? job->rows : SHIFT_ROWS;
    floats sum = {0};
    for (int64_t i = 0; i < used; i++)
        sum += load(job->x, job->rows * i / used * job->channels + channel, bf16);
    return sum / (float)used;
}

INLINE void sum_tile(const struct norm *job, struct sums sums, int64_t row, int rows, int bf16) {
    for (int64_t block = 0; block < blocks_of(job); block++) {
        int64_t channel = first_channel(job, block), slot = block * WIDTH;
        floats sum = load_floats(sums.sum + slot), sum2 = load_floats(sums.sum2 + slot);
        floats shift = load_floats(sums.shift + slot);
        for (int i = 0; i < rows; i++) {
            floats value = load(job->x, (row + i) * job->channels + channel, bf16) - shift;
            sum += value;
            sum2 += value * value;
        }
        store_floats(sums.sum + slot, sum);
        store_floats(sums.sum2 + slot, sum2);
    }
}

INLINE void sum_rows(const struct norm *shared, int64_t part, int bf16) {
    const struct norm copy = *shared, *job = &copy; /* so that no store can seem to change it */
    struct sums sums = sums_of(job, part);
    clear(job, sums);
    for (int64_t block = 0; block < blocks_of(job); block++)
        store_floats(sums.shift + block * WIDTH, shift_of(job, first_channel(job, block), bf16));
    int64_t row = first_of(job->rows, job, part), end = first_of(job->rows, job, part + 1);
    for (int64_t tiles = 1; row < end; row += TILE, tiles++) {
        if (row + TILE <= end)
            sum_tile(job, sums, row, TILE, bf16);
        else
            sum_tile(job, sums, row, (int)(end - row), bf16);
        if (tiles % TILES_IN_FLOAT == 0)
            add_to_totals(job, sums);
    }
    add_to_totals(job, sums);
}

static void sum_part(struct norm *job, int64_t part) {
    if (job->bf16)
        sum_rows(job, part, 1);
    else
        sum_rows(job, part, 0);
}

/* Of some channels: mean and deviation, and what they give for the running ones. */
static void statistics_part(struct norm *job, int64_t part) {
    const float *shift = sums_of(job, 0).shift;
    double rows = (double)job->rows;
    int64_t end = first_of(job->channels, job, part + 1);
    for (int64_t channel = first_of(job->channels, job, part); channel < end; channel++) {
        int64_t slot = slot_of(job, channel);
        double sum = 0, sum2 = 0;
        for (int64_t each = 0; each < job->parts; each++) {
            sum += sums_of(job, each).total[slot];
            sum2 += sums_of(job, each).total2[slot];
        }
        double mean = shift[slot] + sum / rows, variance = (sum2 - sum * sum / rows) / rows;
        variance = variance < 0 ? 0 : variance;
        job->mean[channel] = (float)mean;
        job->inverse_std[channel] = (float)(1 / sqrt(variance + job->eps));
        if (job->running_mean) {
            float *running[] = {job->running_mean + channel, job->running_var + channel};
            double now[] = {mean, variance * rows / (rows - 1)};
            for (int i = 0; i < 2; i++)
                *running[i] = (float)((1 - job->momentum) * *running[i] + job->momentum * now[i]);
        }
    }
}

/* Walks back: the last rows are still in the caches. */
INLINE void normalise_rows(const struct norm *shared, int64_t part, int bf16, int relu,
                           int residual) {
    const struct norm copy = *shared, *job = &copy;
    int64_t begin = first_of(job->rows, job, part), row = first_of(job->rows, job, part + 1);
    while (row-- > begin)
        for (int64_t block = 0; block < blocks_of(job); block++) {
            int64_t channel = first_channel(job, block), index = row * job->channels + channel;
            floats centred = load(job->x, index, bf16) - load_floats(job->mean + channel);
            floats value = normalised(job, channel, centred);
            if (residual)
                value += load(job->residual, index, bf16);
            store(job->y, index, relu ? clip(value) : value, bf16);
        }
}

static void normalise_part(struct norm *job, int64_t part) {
    switch ((job->bf16 ? 4 : 0) + (job->relu ? 2 : 0) + (job->residual ? 1 : 0)) {
#define CASE(bf16, relu, residual) \
    case 4 * bf16 + 2 * relu + residual: normalise_rows(job, part, bf16, relu, residual); break;
        CASE(0, 0, 0) CASE(0, 0, 1) CASE(0, 1, 0) CASE(0, 1, 1)
        CASE(1, 0, 0) CASE(1, 0, 1) CASE(1, 1, 0) CASE(1, 1, 1)
#undef CASE
    }
}

void fused_norm_forward(struct norm *job) {
    run_parts(sum_part, job);
    run_parts(statistics_part, job);
    run_parts(normalise_part, job);
}

/* -- Backward --------------------------------------------------------------------------------- */

/* The gradient in front of the ReLU. With a residual the output tells what was clipped; without one
 * the input does, which is read anyway. */
INLINE floats gradient_at(const struct norm *job, int64_t index, int64_t channel, floats centred,
                          int bf16, int relu, int residual, int twice) {
    floats gradient = load(job->dy, index, bf16);
    if (twice)
        gradient += load(job->dy2, index, bf16);
    if (!relu)
        return gradient;
    floats output = residual ? load(job->y, index, bf16) : normalised(job, channel, centred);
    return where(output > 0, gradient);
}

INLINE void sum_gradient_tile(const struct norm *job, struct sums sums, int64_t row, int rows,
                              int bf16, int relu, int residual, int twice) {
    for (int64_t block = 0; block < blocks_of(job); block++) {
        int64_t channel = first_channel(job, block), slot = block * WIDTH;
        floats sum = load_floats(sums.sum + slot), sum2 = load_floats(sums.sum2 + slot);
        floats mean = load_floats(job->mean + channel);
        for (int i = 0; i < rows; i++) {
            int64_t index = (row + i) * job->channels + channel;
            floats centred = load(job->x, index, bf16) - mean;
            floats gradient =
                gradient_at(job, index, channel, centred, bf16, relu, residual, twice);
            if (residual || twice) {
                store(job->dz, index, gradient, bf16);
                gradient = load(job->dz, index, bf16); /* as the second pass reads it */
            }
            sum += gradient;
            sum2 += gradient * centred;
        }
        store_floats(sums.sum + slot, sum);
        store_floats(sums.sum2 + slot, sum2);
    }
}

INLINE void sum_gradient_rows(const struct norm *shared, int64_t part, int bf16, int relu,
                              int residual, int twice) {
    const struct norm copy = *shared, *job = &copy;
    struct sums sums = sums_of(job, part);
    clear(job, sums);
    int64_t row = first_of(job->rows, job, part), end = first_of(job->rows, job, part + 1);
    for (int64_t tiles = 1; row < end; row += TILE, tiles++) {
        if (row + TILE <= end)
            sum_gradient_tile(job, sums, row, TILE, bf16, relu, residual, twice);
        else
            sum_gradient_tile(job, sums, row, (int)(end - row), bf16, relu, residual, twice);
        if (tiles % TILES_IN_FLOAT == 0)
            add_to_totals(job, sums);
    }
    add_to_totals(job, sums);
}

/* Of some channels: the gradients of weight and bias, and the means that the second pass takes off. */
static void gradient_means_part(struct norm *job, int64_t part) {
    float *mean = means_of(job), *mean_of_x = mean + job->channels;
    int64_t end = first_of(job->channels, job, part + 1);
    for (int64_t channel = first_of(job->channels, job, part); channel < end; channel++) {
        int64_t slot = slot_of(job, channel);
        double sum = 0, sum2 = 0, inverse_std = job->inverse_std[channel];
        for (int64_t each = 0; each < job->parts; each++) {
            sum += sums_of(job, each).total[slot];
            sum2 += sums_of(job, each).total2[slot];
        }
        job->dbias[channel] = (float)sum;
        job->dweight[channel] = (float)(sum2 * inverse_std);
        mean[channel] = (float)(sum / (double)job->rows);
        mean_of_x[channel] = (float)(sum2 * inverse_std * inverse_std / (double)job->rows);
    }
}

INLINE void pass_gradient_rows(const struct norm *shared, int64_t part, int bf16, int relu,
                               int residual, int twice) {
    const struct norm copy = *shared, *job = &copy;
    const float *mean = means_of(job), *mean_of_x = mean + job->channels;
    int64_t begin = first_of(job->rows, job, part), row = first_of(job->rows, job, part + 1);
    while (row-- > begin)
        for (int64_t block = 0; block < blocks_of(job); block++) {
            int64_t channel = first_channel(job, block), index = row * job->channels + channel;
            floats centred = load(job->x, index, bf16) - load_floats(job->mean + channel);
            floats gradient =
                residual || twice
                    ? load(job->dz, index, bf16)
                    : gradient_at(job, index, channel, centred, bf16, relu, residual, twice);
            gradient -= load_floats(mean + channel) + centred * load_floats(mean_of_x + channel);
            store(job->dx, index, gradient * scale_of(job, channel), bf16);
        }
}

#define KINDS(CASE) \
    CASE(0, 0, 0, 0) CASE(0, 0, 0, 1) CASE(0, 0, 1, 0) CASE(0, 0, 1, 1) \
    CASE(0, 1, 0, 0) CASE(0, 1, 0, 1) CASE(0, 1, 1, 0) CASE(0, 1, 1, 1) \
    CASE(1, 0, 0, 0) CASE(1, 0, 0, 1) CASE(1, 0, 1, 0) CASE(1, 0, 1, 1) \
    CASE(1, 1, 0, 0) CASE(1, 1, 0, 1) CASE(1, 1, 1, 0) CASE(1, 1, 1, 1)
#define NUMBER(bf16, relu, residual, twice) (8 * (bf16) + 4 * (relu) + 2 * (residual) + (twice))

static int kind_of(const struct norm *job) {
    return NUMBER(job->bf16 != 0, job->relu != 0, job->residual != NULL, job->dy2 != NULL);
}

static void sum_gradient_part(struct norm *job, int64_t part) {
    switch (kind_of(job)) {
#define CASE(...) case NUMBER(__VA_ARGS__): sum_gradient_rows(job, part, __VA_ARGS__); break;
        KINDS(CASE)
#undef CASE
    }
}

static void pass_gradient_part(struct norm *job, int64_t part) {
    switch (kind_of(job)) {
#define CASE(...) case NUMBER(__VA_ARGS__): pass_gradient_rows(job, part, __VA_ARGS__); break;
        KINDS(CASE)
#undef CASE
    }
}

void fused_norm_backward(struct norm *job) {
    run_parts(sum_gradient_part, job);
    run_parts(gradient_means_part, job);
    run_parts(pass_gradient_part, job);
}
