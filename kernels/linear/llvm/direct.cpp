// regraft::packed_direct: packed_linear from C++. Shapes that Python has checked and run once go
// straight to their kernel, all others to packed_linear. Of torch only its stable C interface is
// used, so that this compiles in an instant; TVM's calling convention is declared here too.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

using Value = uint64_t;  // an argument or result: a number, or a handle that is owned
using Boxed = void (*)(Value*, uint64_t, uint64_t);

extern "C" {
int32_t aoti_torch_get_sizes(void*, int64_t**);
int32_t aoti_torch_get_dim(void*, int64_t*);
int32_t aoti_torch_get_numel(void*, int64_t*);
int32_t aoti_torch_get_dtype(void*, int32_t*);
int32_t aoti_torch_get_device_type(void*, int32_t*);
int32_t aoti_torch_get_data_ptr(void*, void**);
int32_t aoti_torch_is_contiguous(void*, bool*);
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                 void**);
int32_t aoti_torch_delete_tensor_object(void*);
int32_t aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, void**);
int32_t torch_library_impl(void*, const char*, Boxed, uint64_t);
int32_t torch_call_dispatcher(const char*, const char*, Value*, uint64_t);
int32_t torch_string_c_str(void*, const char**);
int32_t torch_delete_string(void*);
}

namespace {

constexpr uint64_t ABI = (2ull << 56) | (10ull << 48);  // torch 2.10, the first with strings
constexpr int CPU = 0, MOST = 512, DIMS = 8, LINE = 64;
constexpr uint8_t INT = 0, UINT = 1, FLOAT = 2;

void check(int32_t code, const char* what) {
  if (code) throw std::runtime_error(std::string("regraft::packed_direct: ") + what);
}

struct Array {  // DLTensor
  void* data;
  int32_t device = 1, index = 0, dims;
  uint8_t code, bits;
  uint16_t lanes = 1;
  int64_t *shape, *strides;
  uint64_t offset = 0;
};

struct Argument {  // TVMFFIAny
  int32_t type = 7, zero = 0;  // a DLTensor
  void* array;
};

using Kernel = int (*)(void*, const Argument*, int32_t, Argument*);

// What Python has run: count rows of activations times packed weights [tiles, bytes]. tile: rows
// that weights meet at once; block: columns whose activations are rounded together.
struct Shape {
  char format[24];
  int64_t count, columns, rows, tiles, bytes, bias, tile, block;
  Kernel kernel;
};

Shape known[MOST];
std::atomic<int> shapes{0}, paused{0};
std::atomic<int64_t> served{0};

struct Tensor {
  void* handle;
  int64_t* sizes = nullptr;
  int64_t dims = 0, numel = 0;
  int32_t dtype = 0, device = 0;
  void* data = nullptr;
  bool contiguous = false;

  explicit Tensor(void* handle) : handle(handle) {
    check(aoti_torch_get_sizes(handle, &sizes) | aoti_torch_get_dim(handle, &dims) |
              aoti_torch_get_numel(handle, &numel) | aoti_torch_get_dtype(handle, &dtype) |
              aoti_torch_get_device_type(handle, &device) |
              aoti_torch_get_data_ptr(handle, &data) |
              aoti_torch_is_contiguous(handle, &contiguous),
          "a tensor cannot be read");
  }

  bool plain(int32_t wanted) const {
    return dtype == wanted && device == CPU && contiguous && !(uintptr_t(data) % LINE);
  }
};

const Shape* find(const Tensor& x, const Tensor& packed, bool bias, const char* format,
                  int64_t rows) {
  if (!x.dims || x.dims > DIMS || packed.dims != 2) return nullptr;
  const int64_t columns = x.sizes[x.dims - 1];
  const int count = shapes.load(std::memory_order_acquire);
  for (const Shape* s = known; s < known + count; ++s)
    if (s->rows == rows && s->columns == columns && s->count * columns == x.numel &&
        s->bias == bias && s->tiles == packed.sizes[0] && s->bytes == packed.sizes[1] &&
        !std::strcmp(s->format, format))
      return s;
  return nullptr;
}

char* scratch(size_t size) {
  thread_local std::unique_ptr<char, void (*)(void*)> own{nullptr, std::free};
  thread_local size_t room = 0;
  if (size > room) {
    own.reset(static_cast<char*>(std::aligned_alloc(LINE, size)));
    if (!own) throw std::bad_alloc();
    room = size;
  }
  return own.get();
}

size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

bool run(const Shape& s, const Tensor& x, const Tensor& packed, const Tensor* bias, void* out) {
  const int64_t padded = (s.count + s.tile - 1) / s.tile * s.tile, blocks = s.columns / s.block;
  const size_t each = lines(4 * padded * blocks), digits = lines(2 * padded * s.columns);
  char* room = scratch(digits + 3 * each);
  int64_t shapes[8][4], steps[8][4];
  Array arrays[8];
  Argument arguments[8];
  int made = 0;
  auto add = [&](void* data, uint8_t code, uint8_t bits, std::initializer_list<int64_t> shape) {
    int64_t *at = shapes[made], *strides = steps[made], step = 1;
    std::copy(shape.begin(), shape.end(), at);
    for (int d = int(shape.size()) - 1; d >= 0; --d) strides[d] = step, step *= at[d];
    Array& array = arrays[made];
    array.data = data, array.dims = int32_t(shape.size()), array.code = code, array.bits = bits;
    array.shape = at, array.strides = strides;
    arguments[made++].array = &array;
  };
  add(x.data, FLOAT, 32, {s.count, s.columns});
  add(packed.data, UINT, 8, {s.tiles, s.bytes});
  add(out, FLOAT, 32, {s.count, s.rows});
  if (bias) add(bias->data, FLOAT, 32, {s.rows});
  add(room, INT, 8, {padded, blocks, 2, s.block});
  add(room + digits, INT, 32, {padded, blocks});
  add(room + digits + each, FLOAT, 32, {padded, blocks});
  add(room + digits + 2 * each, FLOAT, 32, {padded, blocks});
  Argument result;
  result.type = 0, result.array = nullptr;
  return s.kernel(nullptr, arguments, made, &result) == 0;
}

// (Tensor x, Tensor packed, Tensor? bias, str format, int rows) -> Tensor
bool direct(Value* stack) {
  const char* off = std::getenv("REGRAFT_TVM");
  if (paused.load() || (off && !std::strcmp(off, "0"))) return false;
  const Tensor x(reinterpret_cast<void*>(stack[0])), packed(reinterpret_cast<void*>(stack[1]));
  auto* given = reinterpret_cast<Value*>(stack[2]);
  auto* format = reinterpret_cast<void*>(stack[3]);
  const char* name = nullptr;
  check(torch_string_c_str(format, &name), "the format cannot be read");
  const Shape* shape = find(x, packed, given != nullptr, name, int64_t(stack[4]));
  const int32_t f32 = aoti_torch_dtype_float32();
  if (!shape || !x.plain(f32) || !packed.plain(aoti_torch_dtype_uint8())) return false;
  std::unique_ptr<Tensor> bias;
  if (given) {
    bias = std::make_unique<Tensor>(reinterpret_cast<void*>(*given));
    if (!bias->plain(f32) || bias->dims != 1 || bias->numel != shape->rows) return false;
  }
  int64_t sizes[DIMS], strides[DIMS], step = 1;
  std::copy(x.sizes, x.sizes + x.dims, sizes);
  sizes[x.dims - 1] = shape->rows;
  for (int64_t d = x.dims - 1; d >= 0; --d) strides[d] = step, step *= sizes[d];
  void *out = nullptr, *data = nullptr;
  check(aoti_torch_empty_strided(x.dims, sizes, strides, f32, CPU, 0, &out), "no memory");
  check(aoti_torch_get_data_ptr(out, &data), "a tensor cannot be read");
  if (!run(*shape, x, packed, bias.get(), data)) {
    aoti_torch_delete_tensor_object(out);
    return false;
  }
  aoti_torch_delete_tensor_object(x.handle);
  aoti_torch_delete_tensor_object(packed.handle);
  if (given) aoti_torch_delete_tensor_object(bias->handle), delete given;
  torch_delete_string(format);
  ++served;
  stack[0] = reinterpret_cast<Value>(out);
  return true;
}

void packed_direct(Value* stack, uint64_t, uint64_t) {
  if (!direct(stack))
    check(torch_call_dispatcher("regraft::packed_linear", "", stack, ABI), "packed_linear failed");
}

}  // namespace

// Whether the operator is registered.
extern "C" int direct_start() {
  void* library = nullptr;  // for as long as the process
  return !aoti_torch_library_init_impl("regraft", "CPU", __FILE__, __LINE__, &library) &&
         !torch_library_impl(library, "packed_direct", packed_direct, ABI);
}

// Callers take turns.
extern "C" void direct_learn(const char* format, const int64_t* numbers, void* kernel) {
  const int count = shapes.load();
  if (count == MOST || std::strlen(format) >= sizeof(Shape::format)) return;
  Shape& shape = known[count];
  std::strcpy(shape.format, format);
  std::memcpy(&shape.count, numbers, 8 * sizeof(int64_t));
  shape.kernel = reinterpret_cast<Kernel>(kernel);
  shapes.store(count + 1, std::memory_order_release);
}

extern "C" void direct_pause(int more) { paused += more; }

// Calls that did not go to Python.
extern "C" int64_t direct_served() { return served; }
