// A thread pool that shares the work of a call.

// The pool runs one job at a time, item by item; a caller that finds it taken runs its job alone.
// Idle workers spin for a while before they sleep: products follow each other within microseconds,
// and waking a thread takes longer than many of them.

#define SPIN_NS 100000

typedef void (*Work)(void* job, int64_t item, int slot);

static struct {
  pthread_mutex_t taken, sleeping;
  pthread_cond_t awake;
  _Atomic(Work) work;
  _Atomic(void*) job;
  _Atomic int64_t items, done;
  _Atomic uint64_t next;  // generation << 32 | item
  _Atomic uint32_t generation;
  _Atomic int asleep;
  int threads;  // with the caller
} pool = {.taken = PTHREAD_MUTEX_INITIALIZER,
          .sleeping = PTHREAD_MUTEX_INITIALIZER,
          .awake = PTHREAD_COND_INITIALIZER};

static inline void rest(void) {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void help(uint32_t generation, int slot) {
  Work work = atomic_load(&pool.work);
  void* job = atomic_load(&pool.job);
  int64_t items = atomic_load(&pool.items);
  uint64_t at = atomic_load(&pool.next);
  // `next` of a finished job has another generation: the exchange fails and changes nothing.
  while ((uint32_t)(at >> 32) == generation && (int64_t)(at & 0xffffffff) < items) {
    if (atomic_compare_exchange_weak(&pool.next, &at, at + 1)) {
      work(job, at & 0xffffffff, slot);
      atomic_fetch_add(&pool.done, 1);
      at = atomic_load(&pool.next);
    }
  }
}

static void* worker(void* argument) {
  int slot = (int)(intptr_t)argument;
  uint32_t seen = 0;
  for (;;) {
    int64_t since = nanoseconds();
    while (atomic_load(&pool.generation) == seen) {
      for (int i = 0; i < 64 && atomic_load(&pool.generation) == seen; i++) rest();
      if (nanoseconds() - since > SPIN_NS) {
        pthread_mutex_lock(&pool.sleeping);
        atomic_fetch_add(&pool.asleep, 1);
        while (atomic_load(&pool.generation) == seen)
          pthread_cond_wait(&pool.awake, &pool.sleeping);
        atomic_fetch_sub(&pool.asleep, 1);
        pthread_mutex_unlock(&pool.sleeping);
      }
    }
    seen = atomic_load(&pool.generation);
    help(seen, slot);
  }
  return NULL;
}

#if defined(__linux__)
// CPUs of the container's quota (cgroup 2, else 1), rounded up; 0 without a quota.
static int quota(void) {
  double allowed = -1, period = 0;  // stay without a quota: "max 100000" starts with no number
  FILE* f = fopen("/sys/fs/cgroup/cpu.max", "r");
  FILE* limit = f ? NULL : fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r");
  FILE* every = limit ? fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r") : NULL;
  if (f && fscanf(f, "%lf %lf", &allowed, &period) != 2) allowed = -1;
  if (every && fscanf(limit, "%lf", &allowed) + fscanf(every, "%lf", &period) != 2) allowed = -1;
  if (f) fclose(f);
  if (limit) fclose(limit);
  if (every) fclose(every);
  return allowed > 0 && period > 0 ? (int)((allowed + period - 1) / period) : 0;
}
#endif

static int count_threads(void) {
  int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
  cpu_set_t set;
  if (!sched_getaffinity(0, sizeof set, &set)) n = CPU_COUNT(&set);
  int most = quota();
  if (most && most < n) n = most;
#endif
  const char* limit = getenv("NPROC");  // limits XLA's thread pool too
  if (limit && atoi(limit) > 0 && atoi(limit) < n) n = atoi(limit);
  return n < 1 ? 1 : n > 64 ? 64 : n;
}

// A forked child has no workers, and a thread that it lacks may have held the lock.
static void without_workers(void) { pool.threads = 1; }

static void start_pool(void) {
  pthread_atfork(NULL, NULL, without_workers);
  pool.threads = count_threads();
  for (int i = 1; i < pool.threads; i++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void*)(intptr_t)i)) {
      pool.threads = i;
      break;
    }
    pthread_detach(thread);
  }
}

static _Atomic int alone;  // callers that run each call on one thread

static int n_threads(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, start_pool);
  return atomic_load(&alone) ? 1 : pool.threads;
}

// Upper bound of the slots that `share` passes, even if `alone` changes meanwhile.
__attribute__((visibility("default"))) int automoe_threads(void) {
  n_threads();
  return pool.threads;
}

// Changes the number of callers that translate several batches at a time; while it is positive, calls
// do not share their work.
__attribute__((visibility("default"))) void automoe_alone(int change) {
  atomic_fetch_add(&alone, change);
}

static void share(int64_t items, Work work, void* job) {
  if (items <= 1 || n_threads() == 1 || pthread_mutex_trylock(&pool.taken)) {
    for (int64_t i = 0; i < items; i++) work(job, i, 0);
    return;
  }
  uint32_t generation = atomic_load(&pool.generation) + 1;
  // Exhausts the previous job first: a late worker must not take one of its items with the fields
  // of the new job.
  atomic_store(&pool.next, (uint64_t)(generation - 1) << 32 | 0xffffffff);
  atomic_store(&pool.work, work);
  atomic_store(&pool.job, job);
  atomic_store(&pool.items, items);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.next, (uint64_t)generation << 32);
  atomic_store(&pool.generation, generation);
  if (atomic_load(&pool.asleep)) {
    pthread_mutex_lock(&pool.sleeping);
    pthread_cond_broadcast(&pool.awake);
    pthread_mutex_unlock(&pool.sleeping);
  }
  help(generation, 0);
  for (int spins = 0; atomic_load(&pool.done) < items;) {
    rest();
    if (++spins % 1024 == 0) sched_yield();  // the thread with the last item may be waiting for a core
  }
  pthread_mutex_unlock(&pool.taken);
}
