// CosineIndex for Python: argument checks, the GIL, locking between threads. No algorithm.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cosine_knn.hpp"

namespace py = pybind11;

namespace robustft {
namespace {

using knn::CosineIndex;
using knn::DType;
using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Bitmap = py::array_t<std::uint64_t, py::array::c_style>;

DType parse_dtype(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "float16") return DType::float16;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float64") return DType::float64;
    throw py::type_error("dtype must be float16, bfloat16, float32 or float64, got " + name);
}

knn::Tier parse_tier(const std::string& name) {
    if (name == "auto") return knn::Tier::automatic;
    if (name == "int8") return knn::Tier::int8;
    if (name == "float32") return knn::Tier::float32;
    if (name == "exact") return knn::Tier::exact;
    throw std::invalid_argument("tier must be auto, int8, float32 or exact, got " + name);
}

knn::Rows view(const py::array& array, DType dtype, std::size_t dim, const char* name) {
    if (array.ndim() != 2 || static_cast<std::size_t>(array.shape(1)) != dim ||
        static_cast<std::size_t>(array.itemsize()) != knn::item_size(dtype) ||
        (array.size() > 0 && array.shape(1) > 1 && array.strides(1) != array.itemsize())) {
        throw std::invalid_argument(std::string(name) + " must be [rows, " + std::to_string(dim) +
                                    "] with contiguous rows of the named dtype");
    }
    return {array.data(), array.strides(0), static_cast<std::size_t>(array.shape(0)), dtype};
}

// Ctrl-C and the progress callback, from the calling thread.
Monitor::Poll python_poll(const py::object& progress) {
    return [progress = progress.ptr()](std::uint64_t done) {
        const py::gil_scoped_acquire gil;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (progress != Py_None) py::reinterpret_borrow<py::object>(progress)(done);
    };
}

class Index {
  public:
    Index(std::size_t dim, const std::string& dtype, const std::string& isa)
        : index_(dim, parse_dtype(dtype), knn::choose_kernels(isa)) {}

    void append(const py::array& rows, const std::optional<Ids>& ids, unsigned threads,
                const py::object& progress) {
        const knn::Rows block = view(rows, index_.dtype(), index_.dim(), "embeddings");
        if (ids && (ids->ndim() != 1 || static_cast<std::size_t>(ids->size()) != block.count)) {
            throw std::invalid_argument("ids must be one per row");
        }
        Monitor monitor(python_poll(progress));
        {
            const py::gil_scoped_release release;
            const std::unique_lock lock =
                locked<std::unique_lock<std::shared_timed_mutex>>(monitor);
            index_.append(block, ids ? ids->data() : nullptr, threads, monitor);
        }
        keep(rows);
    }

    // The first rows of an empty index and the blocks `blocks` gave for them.
    void attach(const py::array& rows, const std::optional<Ids>& ids,
                const py::array_t<std::uint8_t, py::array::c_style>& blocks) {
        const knn::Rows block = view(rows, index_.dtype(), index_.dim(), "embeddings");
        const std::size_t count = (block.count + knn::kBlockRows - 1) / knn::kBlockRows;
        if (ids && (ids->ndim() != 1 || static_cast<std::size_t>(ids->size()) != block.count)) {
            throw std::invalid_argument("ids must be one per row");
        }
        if (static_cast<std::size_t>(blocks.size()) != count * index_.blocks().block_bytes() ||
            reinterpret_cast<std::uintptr_t>(blocks.data()) % alignof(knn::BlockHead) != 0) {
            throw std::invalid_argument("blocks must be those of the rows, aligned");
        }
        const auto lock = locked<std::unique_lock<std::shared_timed_mutex>>();
        index_.attach(block, ids ? ids->data() : nullptr, blocks.data());
        keep(rows);
        keep(blocks);
    }

    // The quantised rows [blocks, bytes per block] in parts, without copying; they stay valid only
    // until the next append.
    py::list blocks(const py::object& self) const {
        py::list out;
        const auto bytes = static_cast<py::ssize_t>(index_.blocks().block_bytes());
        const auto lock = locked<std::shared_lock<std::shared_timed_mutex>>();
        for (const auto& span :
             index_.blocks().spans((index_.size() + knn::kBlockRows - 1) / knn::kBlockRows)) {
            out.append(py::array_t<std::uint8_t>({static_cast<py::ssize_t>(span.blocks), bytes},
                                                 static_cast<const std::uint8_t*>(span.data),
                                                 self));
        }
        return out;
    }

    void check(const py::array& rows, unsigned threads) {
        const knn::Rows block = view(rows, index_.dtype(), index_.dim(), "embeddings");
        Monitor monitor(python_poll(py::none()));
        const py::gil_scoped_release release;
        index_.check(block, "embeddings", threads, monitor);
    }

    py::tuple search(const py::array& queries, const std::string& dtype, std::size_t k,
                     const std::optional<Ids>& exclude, const std::optional<Bitmap>& allowed,
                     double threshold, unsigned threads, const std::string& tier,
                     const py::object& progress) {
        const knn::Rows rows = view(queries, parse_dtype(dtype), index_.dim(), "queries");
        if (exclude && static_cast<std::size_t>(exclude->size()) != rows.count) {
            throw std::invalid_argument("exclude must be one id per query");
        }
        knn::SearchOptions options;
        options.k = k;
        options.exclude = exclude ? exclude->data() : nullptr;
        options.threshold = threshold;
        options.threads = threads;
        options.tier = parse_tier(tier);
        const auto shape = std::vector<py::ssize_t>{static_cast<py::ssize_t>(rows.count),
                                                    static_cast<py::ssize_t>(k)};
        py::array_t<std::int64_t> ids(shape);
        py::array_t<float> cosines(shape);
        std::int64_t* id_data = ids.mutable_data();
        float* cosine_data = cosines.mutable_data();
        knn::SearchStats stats;
        Monitor monitor(python_poll(progress));
        {
            const py::gil_scoped_release release;
            const auto lock = locked<std::shared_lock<std::shared_timed_mutex>>(monitor);
            std::vector<std::uint64_t> bits;
            if (allowed) {
                // Rows added since the bits were set are not among those allowed.
                bits.assign(allowed->data(), allowed->data() + allowed->size());
                bits.resize(std::max(bits.size(), (index_.size() + 63) / 64));
                options.allowed = bits.data();
            }
            stats = index_.search(rows, options, id_data, cosine_data, monitor);
        }
        py::dict counters;
        counters["int8_pairs"] = stats.int8_pairs;
        counters["float_pairs"] = stats.float_pairs;
        counters["rescored"] = stats.rescored;
        return py::make_tuple(ids, cosines, counters);
    }

    Ids ids() const {
        const auto lock = locked<std::shared_lock<std::shared_timed_mutex>>();
        return Ids(static_cast<py::ssize_t>(index_.ids().size()), index_.ids().data());
    }
    const CosineIndex& core() const { return index_; }
    std::size_t size() const {
        const auto lock = locked<std::shared_lock<std::shared_timed_mutex>>();
        return index_.size();
    }
    std::size_t extra_bytes() const {
        const auto lock = locked<std::shared_lock<std::shared_timed_mutex>>();
        return index_.extra_bytes();
    }

  private:
    // Waits for the lock without the GIL, which whoever holds the lock needs from time to time.
    template <class Lock>
    Lock locked() const {
        const py::gil_scoped_release release;
        return Lock(mutex_);
    }

    // The same, and Ctrl-C still works.
    template <class Lock>
    Lock locked(Monitor& monitor) {
        Lock lock(mutex_, std::defer_lock);
        while (!lock.try_lock_for(Monitor::interval)) monitor.poll_if_due();
        return lock;
    }

    // Whatever owns the memory, once however many views of it come.
    void keep(const py::array& array) {
        py::object owner = array.base() ? array.base() : py::object(array);
        if (owners_.empty() || !owners_.back().is(owner)) owners_.push_back(std::move(owner));
    }

    CosineIndex index_;
    mutable std::shared_timed_mutex mutex_;
    std::vector<py::object> owners_;  // of the rows' memory
};

}  // namespace

void bind_cosine_knn(py::module_& module) {
    module.def("hardware_threads", &hardware_threads);
    module.def("knn_isas", [] {
        std::vector<std::string> names;
        for (const knn::Kernels* kernels : knn::available_kernels()) names.push_back(kernels->name);
        return names;
    });
    py::class_<Index>(module, "CosineIndex")
        .def(py::init<std::size_t, const std::string&, const std::string&>(), py::arg("dim"),
             py::arg("dtype"), py::arg("isa"))
        .def("append", &Index::append, py::arg("rows"), py::arg("ids"), py::arg("threads"),
             py::arg("progress"))
        .def("attach", &Index::attach, py::arg("rows"), py::arg("ids"), py::arg("blocks"))
        .def("blocks",
             [](const py::object& self) { return self.cast<const Index&>().blocks(self); })
        .def("check", &Index::check, py::arg("rows"), py::arg("threads"))
        .def("search", &Index::search, py::arg("queries"), py::arg("dtype"), py::arg("k"),
             py::arg("exclude"), py::arg("allowed"), py::arg("threshold"), py::arg("threads"),
             py::arg("tier"), py::arg("progress"))
        .def("ids", &Index::ids)
        .def_property_readonly("isa",
                               [](const Index& index) { return index.core().kernels().name; })
        .def_property_readonly("extra_bytes", &Index::extra_bytes)
        .def("__len__", &Index::size);
}

}  // namespace robustft
