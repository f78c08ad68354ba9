/* Runs TVM's parallel loops on the OpenMP pool that torch has already started. */
#include <stdint.h>

typedef struct {
  void *sync_handle;
  int32_t num_task;
} Environment;
typedef int (*Task)(int, Environment *, void *);
typedef struct {
  Task task;
  void *data;
  int code;
} Call;

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
int omp_get_thread_num(void);
int omp_get_num_threads(void);

static void run(void *argument) {
  Call *call = argument;
  Environment environment = {0, omp_get_num_threads()};
  int code = call->task(omp_get_thread_num(), &environment, call->data);
  if (code) __atomic_store_n(&call->code, code, __ATOMIC_RELAXED);
}

int omp_launch(Task task, void *data, int count) {
  Call call = {task, data, 0};
  GOMP_parallel(run, &call, count > 0 ? count : 0, 0);
  return call.code;
}
