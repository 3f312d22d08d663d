// The Python module `_cpu`: checks what it is given, then runs a layer's step.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "dispatch.h"
#include "step.h"
#include "threads.h"

namespace nb = nanobind;

namespace duo {
namespace {

using Tensor = nb::ndarray<nb::ro, nb::device::cpu>;

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string text(int64_t number) { return std::to_string(number); }

template <typename Any>
std::string shape_of(const Any& tensor) {
    std::string result = "[";
    for (size_t i = 0; i < tensor.ndim(); ++i) {
        result += (i ? ", " : "") + text(static_cast<int64_t>(tensor.shape(i)));
    }
    return result + "]";
}

// A tensor as Python describes it: (address, dtype, shape, strides in elements). DLPack would say
// the same, but frameworks take several microseconds to export a tensor, and a step has six in each
// layer. The caller keeps the memory.
class View {
  public:
    static constexpr size_t MAX_DIMS = 4;

    explicit View(const nb::handle& described) {
        PyObject* tuple = described.ptr();
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) refuse();
        data_ = reinterpret_cast<char*>(number(PyTuple_GET_ITEM(tuple, 0)));
        dtype_ = static_cast<Dtype>(number(PyTuple_GET_ITEM(tuple, 1)));
        ndim_ = numbers(PyTuple_GET_ITEM(tuple, 2), shape_);
        if (ndim_ != numbers(PyTuple_GET_ITEM(tuple, 3), strides_)) refuse();
    }

    char* data() const { return data_; }
    Dtype dtype() const { return dtype_; }
    size_t ndim() const { return ndim_; }
    int64_t shape(size_t i) const { return shape_[i]; }
    int64_t stride(size_t i) const { return strides_[i]; }

  private:
    [[noreturn]] static void refuse() {
        fail("a tensor must be given as (address, dtype, shape, strides) of up to " +
             text(MAX_DIMS) + " dimensions");
    }

    static int64_t number(PyObject* object) {
        const long long value = PyLong_AsLongLong(object);
        if (value == -1 && PyErr_Occurred()) throw nb::python_error();
        return value;
    }

    static size_t numbers(PyObject* tuple, int64_t* to) {
        if (!PyTuple_Check(tuple)) refuse();
        const auto count = static_cast<size_t>(PyTuple_GET_SIZE(tuple));
        if (count > MAX_DIMS) refuse();
        for (size_t i = 0; i < count; ++i) to[i] = number(PyTuple_GET_ITEM(tuple, i));
        return count;
    }

    char* data_;
    Dtype dtype_;
    size_t ndim_;
    int64_t shape_[MAX_DIMS];
    int64_t strides_[MAX_DIMS];
};

struct Heads {
    std::vector<int32_t> classes[2];

    Heads(const std::vector<int32_t>& retrieval, const std::vector<int32_t>& streaming)
        : classes{retrieval, streaming} {
        for (const auto& heads : classes) {
            for (const int32_t head : heads) {
                if (head < 0 || head >= total()) {
                    fail("head map has head " + text(head) + " of " + text(total()) +
                         " KV heads: number them from 0");
                }
            }
        }
    }
    int64_t total() const { return static_cast<int64_t>(classes[0].size() + classes[1].size()); }
};

struct Batch {
    std::vector<Request> requests;
    int64_t num_tokens = 0;

    Batch(const std::vector<int64_t>& starts, const std::vector<int64_t>& seq_lens) {
        if (starts.size() != seq_lens.size() + 1) {
            fail("query_start_loc must have one entry more than seq_lens, got " +
                 text(static_cast<int64_t>(starts.size())) + " and " +
                 text(static_cast<int64_t>(seq_lens.size())));
        }
        for (size_t i = 0; i < seq_lens.size(); ++i) {
            const int64_t length = starts[i + 1] - starts[i];
            if (starts[0] != 0 || length < 0 || length > seq_lens[i]) {
                fail("request " + text(static_cast<int64_t>(i)) + " has a chunk of " +
                     text(length) + " tokens and " + text(seq_lens[i]) +
                     " in all: chunks start at 0 and are not "
                     "longer than their request");
            }
            requests.push_back({starts[i], length, seq_lens[i] - length});
        }
        num_tokens = starts.back();
    }
};

struct BlockTable {
    Tensor tensor;  // keeps the memory
    Table table;
    bool is_ring;
    int64_t sink, recent, ring;

    BlockTable(Tensor blocks, int64_t block_size, bool is_ring, int64_t sink, int64_t recent,
               int64_t ring)
        : tensor(blocks), is_ring(is_ring), sink(sink), recent(recent), ring(ring) {
        const char* name = is_ring ? "streaming block table" : "retrieval block table";
        if (blocks.ndim() != 2 || blocks.dtype() != nb::dtype<int32_t>() ||
            (blocks.shape(1) > 1 && blocks.stride(1) != 1)) {
            fail(std::string(name) + " must be [B, width] int32 with contiguous rows, got " +
                 shape_of(blocks));
        }
        if (block_size < 1 || (is_ring && (sink < 0 || recent < 1 || ring < recent))) {
            fail(std::string(name) + " has block size " + text(block_size) + ", sink " +
                 text(sink) + ", recent " + text(recent) + ", ring " + text(ring) +
                 ": the block size and recent must be positive, the ring at least recent");
        }
        table = {static_cast<const int32_t*>(blocks.data()), blocks.stride(0),
                 static_cast<int64_t>(blocks.shape(0)), static_cast<int64_t>(blocks.shape(1)),
                 block_size};
    }

    // Slots that a request of so many tokens uses.
    int64_t slots(int64_t tokens) const { return is_ring ? std::min(tokens, sink + ring) : tokens; }
};

struct Copies {
    std::vector<Tensor> tensors;  // keep the memory
    std::vector<SnapshotCopy> copies;

    void add(bool store, int row, int64_t num_tokens, Tensor blocks) {
        if (blocks.ndim() != 1 || blocks.dtype() != nb::dtype<int64_t>() ||
            (blocks.shape(0) > 1 && blocks.stride(0) != 1)) {
            fail("a snapshot's blocks must be [n] int64, got " + shape_of(blocks));
        }
        tensors.push_back(blocks);
        copies.push_back({store, row, num_tokens, static_cast<const int64_t*>(blocks.data()),
                          static_cast<int64_t>(blocks.shape(0))});
    }
};

Rows rows_of(const char* name, const View& tensor) {
    if (tensor.ndim() != 3 || tensor.stride(2) != 1) {
        fail(std::string(name) + " must be [T, H, D] with a contiguous last dimension, got " +
             shape_of(tensor) + ": pass a contiguous tensor");
    }
    return {tensor.data(), tensor.stride(0), tensor.stride(1)};
}

Cache cache_of(const char* name, const View& tensor, const LayerStep& step, int64_t heads,
               int64_t block_size) {
    // Quantised, or of the activations' dtype.
    const bool quantised = is_quantised(tensor.dtype());
    const Dtype dtype = quantised ? tensor.dtype() : step.activations;
    const int64_t row = row_bytes(dtype, step.head_size) / element_bytes(dtype);
    if (tensor.ndim() != 4 || tensor.shape(1) != heads || tensor.shape(2) != block_size ||
        tensor.shape(3) != row || tensor.stride(3) != 1 || tensor.dtype() != dtype) {
        fail(std::string(name) + " cache must be [N, " + text(heads) + ", " + text(block_size) +
             ", " + text(row) + "] of the " + (quantised ? "quantised" : "key's") +
             " dtype with a contiguous last dimension, got " + shape_of(tensor));
    }
    return {tensor.data(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.shape(0)};
}

void check_table(const char* name, const HeadClass& heads, const BlockTable& blocks,
                 const Batch& batch, bool entries) {
    const Table& table = heads.table;
    const auto num_requests = static_cast<int64_t>(batch.requests.size());
    if (table.num_rows < num_requests) {
        fail(std::string(name) + " block table has " + text(table.num_rows) +
             " rows, the batch has " + text(num_requests) + " requests");
    }
    for (int64_t row = 0; row < num_requests; ++row) {
        const Request& request = batch.requests[row];
        if (request.length == 0) continue;
        const int64_t slots = blocks.slots(request.context + request.length);
        const int64_t used = (slots + table.block_size - 1) / table.block_size;
        if (used > table.width) {
            fail(std::string(name) + " block table has " + text(table.width) +
                 " columns, request " + text(row) + " needs " + text(used));
        }
        if (!entries) continue;
        for (int64_t column = 0; column < used; ++column) {
            const int32_t block = table.blocks[row * table.row_stride + column];
            if (block < 1 || block >= heads.cache.num_blocks) {
                fail(std::string(name) + " block table has block " + text(block) + " at row " +
                     text(row) + ", column " + text(column) + ": blocks are 1 to " +
                     text(heads.cache.num_blocks - 1) + ", 0 is the null block");
            }
        }
    }
}

// Fills in a class; nothing where the layer has no head of it.
void set_class(const char* name, HeadClass& to, const std::vector<int32_t>& heads, nb::handle cache,
               const BlockTable* blocks, const LayerStep& step, const Batch& batch, bool check) {
    if (heads.empty()) return;
    if (cache.is_none() || !blocks) {
        fail("the layer has " + text(static_cast<int64_t>(heads.size())) + " " + name +
             " heads and no " + name + " cache");
    }
    const View view(cache);
    to.cache =
        cache_of(name, view, step, static_cast<int64_t>(heads.size()), blocks->table.block_size);
    to.dtype = view.dtype();
    to.table = blocks->table;
    to.heads = heads.data();
    to.num_heads = static_cast<int>(heads.size());
    to.is_ring = blocks->is_ring;
    to.sink = blocks->sink;
    to.recent = blocks->recent;
    to.ring = blocks->ring;
    check_table(name, to, *blocks, batch, check);
}

void check_activations(const View& key, const View& value, const Heads& heads, const Batch& batch) {
    if (key.ndim() != 3 || value.ndim() != 3 || key.dtype() != value.dtype() ||
        key.shape(0) != value.shape(0) || key.shape(1) != value.shape(1) ||
        key.shape(2) != value.shape(2)) {
        fail("key and value must be [T, Hkv, D] of one dtype, got " + shape_of(key) + " and " +
             shape_of(value));
    }
    const int64_t kv_heads = key.shape(1);
    if (kv_heads != heads.total()) {
        fail("key has " + text(kv_heads) + " KV heads, the head map " + text(heads.total()));
    }
    if (key.shape(0) < batch.num_tokens) {
        fail("key has " + text(key.shape(0)) + " tokens, the batch needs " +
             text(batch.num_tokens));
    }
    const int64_t head_size = key.shape(2);
    if (head_size == 0 || head_size % 16 || head_size > MAX_HEAD_SIZE) {
        fail("the head size must be a multiple of 16 up to " + text(MAX_HEAD_SIZE) +
             " for the CPU kernels, got " + text(head_size));
    }
}

void set_queries(LayerStep& step, const View& query, const View& output, const View& key) {
    const int64_t kv_heads = key.shape(1);
    step.query = rows_of("query", query);
    step.output = rows_of("output", output);
    if (query.shape(0) != key.shape(0) || query.shape(2) != key.shape(2)) {
        fail("query must be [T, Hq, D] for key " + shape_of(key) + ", got " + shape_of(query));
    }
    const int64_t heads = query.shape(1);
    if (kv_heads == 0 || heads == 0 || heads % kv_heads) {
        fail("query has " + text(heads) + " heads, not a multiple of " + text(kv_heads) +
             " KV heads");
    }
    if (query.dtype() != key.dtype() || output.dtype() != key.dtype() ||
        output.shape(0) != query.shape(0) || output.shape(1) != query.shape(1) ||
        output.shape(2) != query.shape(2)) {
        fail("output and query must have one shape and the key's dtype, got " + shape_of(output) +
             " and " + shape_of(query));
    }
    step.group = static_cast<int>(heads / kv_heads);
}

void set_sinks(LayerStep& step, const View& sinks, int64_t query_heads) {
    if (sinks.ndim() != 1 || sinks.shape(0) != query_heads || sinks.dtype() != Dtype::f32 ||
        (query_heads > 1 && sinks.stride(0) != 1)) {
        fail("sinks must be [" + text(query_heads) + "] float32, one of each query head, got " +
             shape_of(sinks) + ": convert them once, when the weights have loaded");
    }
    step.sinks = reinterpret_cast<const float*>(sinks.data());
}

const Kernels* chosen = nullptr;

void run(unsigned phases, const Batch& batch, const Heads& heads, nb::handle query,
         nb::handle key_tuple, nb::handle value_tuple, nb::handle output, float scale, int first,
         int last, nb::handle retrieval, const BlockTable* paged, nb::handle streaming,
         const BlockTable* ring, const Copies* copies, float key_scale, float value_scale,
         nb::handle sinks, bool check) {
    const View key(key_tuple), value(value_tuple);
    check_activations(key, value, heads, batch);
    LayerStep step{};
    step.activations = key.dtype();
    // Greater than zero, also where it is NaN.
    if (!(key_scale > 0) || !(value_scale > 0)) {
        fail("the scales of a quantised cache must be positive, got " + std::to_string(key_scale) +
             " and " + std::to_string(value_scale));
    }
    step.key_scale = key_scale;
    step.value_scale = value_scale;
    step.head_size = static_cast<int>(key.shape(2));
    step.key = rows_of("key", key);
    step.value = rows_of("value", value);
    step.scale = scale;
    step.requests = batch.requests.data();
    step.num_requests = static_cast<int>(batch.requests.size());
    set_class("retrieval", step.classes[0], heads.classes[0], retrieval, paged, step, batch, check);
    set_class("streaming", step.classes[1], heads.classes[1], streaming, ring, step, batch, check);
    const Dtype retrieval_dtype = step.classes[0].dtype, streaming_dtype = step.classes[1].dtype;
    if (is_quantised(retrieval_dtype) && is_quantised(streaming_dtype) &&
        retrieval_dtype != streaming_dtype) {
        fail("the retrieval and the streaming cache have two quantised dtypes, expected one");
    }
    if (phases & ATTEND) {
        set_queries(step, View(query), View(output), key);
        if (!sinks.is_none()) set_sinks(step, View(sinks), key.shape(1) * step.group);
        if (first < 0 || first > last || last > step.num_requests) {
            fail("requests " + text(first) + " to " + text(last) + " of a batch of " +
                 text(step.num_requests));
        }
    }
    static const std::vector<SnapshotCopy> none;
    const auto& list = copies ? copies->copies : none;
    if (!chosen) chosen = &best_kernels();
    const nb::gil_scoped_release released;
    run_step(step, *chosen, phases, first, last, list);
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Variant& variant : variants()) {
        if (variant.supported) names.emplace_back(variant.kernels->name);
    }
    return names;
}

}  // namespace

NB_MODULE(_cpu, module) {
    // A step's tables live as long as its batch, which vLLM may still hold as the process ends.
    nb::set_leak_warnings(false);
    nb::class_<Heads>(module, "Heads")
        .def(nb::init<const std::vector<int32_t>&, const std::vector<int32_t>&>());
    nb::class_<Batch>(module, "Batch")
        .def(nb::init<const std::vector<int64_t>&, const std::vector<int64_t>&>());
    nb::class_<BlockTable>(module, "BlockTable")
        .def(nb::init<Tensor, int64_t, bool, int64_t, int64_t, int64_t>());
    nb::class_<Copies>(module, "Copies").def(nb::init<>()).def("add", &Copies::add);
    module.attr("WRITE_RETRIEVAL") = static_cast<unsigned>(WRITE_RETRIEVAL);
    module.attr("COPY_SNAPSHOTS") = static_cast<unsigned>(COPY_SNAPSHOTS);
    module.attr("ATTEND") = static_cast<unsigned>(ATTEND);
    module.attr("WRITE_STREAMING") = static_cast<unsigned>(WRITE_STREAMING);
    module.attr("FLOAT32") = static_cast<int>(Dtype::f32);
    module.attr("BFLOAT16") = static_cast<int>(Dtype::bf16);
    module.attr("FLOAT16") = static_cast<int>(Dtype::f16);
    module.attr("FP8_E4M3") = static_cast<int>(Dtype::e4m3);
    module.attr("FP8_E5M2") = static_cast<int>(Dtype::e5m2);
    module.attr("SCALED_FP8_E4M3") = static_cast<int>(Dtype::scaled_e4m3);
    module.attr("SCALED_INT4") = static_cast<int>(Dtype::scaled_i4);
    module.attr("SCALED_INT8") = static_cast<int>(Dtype::scaled_i8);
    module.def("run", &run, nb::arg("phases"), nb::arg("batch"), nb::arg("heads"),
               nb::arg("query").none(), nb::arg("key"), nb::arg("value"), nb::arg("output").none(),
               nb::arg("scale"), nb::arg("first"), nb::arg("last"), nb::arg("retrieval").none(),
               nb::arg("paged").none(), nb::arg("streaming").none(), nb::arg("ring").none(),
               nb::arg("copies").none(), nb::arg("key_scale"), nb::arg("value_scale"),
               nb::arg("sinks").none(), nb::arg("check"));
    module.def("isa", [] { return std::string(chosen ? chosen->name : best_kernels().name); });
    module.def("force_isa", [](const std::string& name) { chosen = &kernels_named(name); });
    module.def("supported_isas", &supported_isas);
    module.def("max_threads", &max_threads);
    module.def("openmp_library", [] { return std::string(openmp_library()); });
}

}  // namespace duo
