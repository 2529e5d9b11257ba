/* Work shared out to threads. */
#pragma once

/* Does items [from, to) of a job. Of the calls at one time each has another `slot`, from 0 to threads - 1. */
typedef void Work(void *job, long from, long to, int slot);

/* Does `count` items on at most `threads` threads, in pieces of whole `step`s, and returns when all are done. */
void in_parallel(Work *work, void *job, long count, long step, int threads);
