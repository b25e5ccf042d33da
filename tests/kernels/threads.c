/* Threads in place of OpenMP's, which ThreadSanitizer would not understand, and calls of the operator
 * on many of them. Compiled with the operator's file by test_races.py. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "fused_norm.c"

enum { MOST_THREADS = 8 };

static _Thread_local int number;
static int team_size; /* of the one team that runs */

struct start {
    void (*run)(void *);
    void *data;
    int number;
};

static void *run_one(void *given) {
    struct start *start = given;
    number = start->number;
    start->run(start->data);
    return NULL;
}

void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t started[MOST_THREADS];
    struct start starts[MOST_THREADS];
    (void)flags;
    team_size = threads < MOST_THREADS ? (int)threads : MOST_THREADS;
    for (int i = 1; i < team_size; i++) {
        starts[i] = (struct start){run, data, i};
        pthread_create(&started[i], NULL, run_one, &starts[i]);
    }
    number = 0;
    run(data);
    for (int i = 1; i < team_size; i++)
        pthread_join(started[i], NULL);
}

int omp_get_thread_num(void) { return number; }

int omp_get_num_threads(void) { return team_size; }

static void *room_for(int64_t bytes) { return calloc((size_t)bytes, 1); }

int main(void) {
    int64_t shapes[][3] = {{37, 33, 5}, {3, 16, 8}, {64, 100, 13}, {1000, 17, 3}};
    for (int kind = 0; kind < 16; kind++)
        for (int i = 0; i < 4; i++) {
            int64_t rows = shapes[i][0], channels = shapes[i][1], parts = shapes[i][2];
            int64_t bytes = 4 * rows * channels;
            float *arrays[8];
            for (int j = 0; j < 8; j++)
                arrays[j] = room_for(4 * channels);
            void *x = room_for(bytes), *y = room_for(bytes), *other = room_for(bytes);
            void *dz = room_for(bytes), *dx = room_for(bytes), *gradient = room_for(bytes);
            struct norm job = {
                .rows = rows, .channels = channels, .parts = parts, .bf16 = kind & 1,
                .relu = kind & 2, .eps = 1e-5, .momentum = 0.1,
                .weight = arrays[0], .bias = arrays[1],
                .running_mean = arrays[2], .running_var = arrays[3],
                .mean = arrays[4], .inverse_std = arrays[5],
                .x = x, .residual = kind & 4 ? other : NULL, .y = y,
                .dy = gradient, .dy2 = kind & 8 ? other : NULL, .dz = dz, .dx = dx,
                .dweight = arrays[6], .dbias = arrays[7],
                .room = room_for(fused_norm_room(channels, parts)),
            };
            fused_norm_forward(&job);
            fused_norm_backward(&job);
            for (int j = 0; j < 8; j++)
                free(arrays[j]);
            free(x), free(y), free(other), free(dz), free(dx), free(gradient), free(job.room);
        }
    return 0;
}
