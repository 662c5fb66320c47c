// Working memory of kernel calls.

enum { QUANTIZED, SCALES, HIDDEN_QUANTIZED, HIDDEN_SCALES, HIDDEN, RESULT, ROUTED, PARTS, KINDS };

typedef struct {
  void* at[KINDS];
  size_t size[KINDS];
} Scratch;

static pthread_key_t scratch_key;

static void free_scratch(void* own) {
  for (int i = 0; i < KINDS; i++) free(((Scratch*)own)->at[i]);
  free(own);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, free_scratch); }

// A buffer of this thread, kept for later calls; NULL if memory has run out.
static void* scratch(int which, size_t size) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, make_scratch_key);
  Scratch* own = pthread_getspecific(scratch_key);
  if (!own) {
    own = calloc(1, sizeof *own);
    if (!own) return NULL;
    pthread_setspecific(scratch_key, own);
  }
  if (!own->at[which] || own->size[which] < size) {
    free(own->at[which]);
    size = up(size + size / 4 + 1, 64) * 64;
    own->at[which] = aligned_alloc(64, size);
    own->size[which] = own->at[which] ? size : 0;
  }
  return own->at[which];
}
