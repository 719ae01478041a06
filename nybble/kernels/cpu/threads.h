/* Pieces of work over the threads of torch's own pool.
 *
 * `run` is GOMP_parallel of the OpenMP runtime that torch itself is linked with, handed in by the caller: a second
 * runtime would keep spinning threads of its own beside torch's. NULL: everything runs in the calling thread.
 * Threads take the next piece when they are free, so a core that is busy elsewhere delays nobody.
 */
#ifndef NYBBLE_THREADS_H
#define NYBBLE_THREADS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef void parallel(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

struct threads {
    parallel *run;
    int64_t count;
};

struct pieces {
    void (*piece)(const void *job, int64_t index);
    const void *job;
    int64_t total;
    atomic_llong next; /* the first piece nobody has taken */
};

static void take_pieces(void *argument) {
    struct pieces *p = argument;
    for (int64_t index; (index = atomic_fetch_add(&p->next, 1)) < p->total;) p->piece(p->job, index);
}

#define SMALL_WORK (1 << 18) /* multiplications; waking a thread costs as much as tens of thousands of them */

static void for_each(struct threads threads, int64_t multiplications, int64_t total,
                     void (*piece)(const void *job, int64_t index), const void *job) {
    struct pieces p = {piece, job, total, 0};
    if (threads.run == NULL || threads.count < 2 || total < 2 || multiplications < SMALL_WORK)
        take_pieces(&p);
    else
        threads.run(take_pieces, &p, (unsigned)(threads.count < total ? threads.count : total), 0);
}

#endif
