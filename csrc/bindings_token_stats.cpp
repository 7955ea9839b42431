// robustft._core.token_stats*: checks, GIL release; the algorithm is in token_stats.cpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "token_stats.hpp"

namespace robustft {
namespace {

namespace py = pybind11;
namespace ts = token_stats;
using Ids = py::array_t<std::int64_t, py::array::c_style>;

// numpy has no bfloat16: its bits come as uint16, IEEE halves as float16.
ts::Type type_of(const py::array& logits) {
    const py::dtype type = logits.dtype();
    if (type.kind() == 'f' && type.itemsize() == 8) return ts::Type::f64;
    if (type.kind() == 'f' && type.itemsize() == 4) return ts::Type::f32;
    if (type.kind() == 'f' && type.itemsize() == 2) return ts::Type::f16;
    if (type.kind() == 'u' && type.itemsize() == 2) return ts::Type::bf16;
    throw py::type_error(
        "logits must be float64, float32, float16 or uint16 (bfloat16 bits), got dtype '" +
        (type.kind() + std::to_string(type.itemsize())) + "'");
}

ts::Logits view(const py::array& logits) {
    const ts::Type type = type_of(logits);
    if (logits.ndim() != 3 || logits.shape(2) < 1) {
        throw py::value_error("logits must be [outer, inner, vocab] with vocab >= 1");
    }
    const py::ssize_t size = logits.itemsize();
    // Where nothing is read strides mean nothing, and numpy makes some up.
    if (logits.size() == 0)
        return {nullptr, type, logits.shape(0), logits.shape(1), logits.shape(2), 0, 0};
    if (logits.shape(2) > 1 && logits.strides(2) != size) {
        throw py::value_error("logits must have unit stride in the last dimension");
    }
    if (logits.strides(0) % size != 0 || logits.strides(1) % size != 0) {
        throw py::value_error("logits must have strides that are whole elements");
    }
    return {logits.data(),           type,
            logits.shape(0),         logits.shape(1),
            logits.shape(2),         logits.strides(0) / size,
            logits.strides(1) / size};
}

template <class T>
const T* column(const std::optional<py::array_t<T, py::array::c_style>>& values, std::int64_t rows,
                const char* name) {
    if (!values) return nullptr;
    if (values->ndim() != 1 || values->shape(0) != rows) {
        throw py::value_error(std::string(name) + " must be [" + std::to_string(rows) + "]");
    }
    return values->data();
}

template <class Real>
using Column = py::array_t<Real, py::array::c_style>;
template <class Real>
using MaybeColumn = std::optional<Column<Real>>;

ts::Options options(double temperature, double softcap, std::int64_t ignore_index, unsigned threads,
                    const std::string& isa) {
    return {temperature, softcap, ignore_index, threads, isa};
}

template <class Real>
py::tuple compute(const ts::Logits& logits, const std::int64_t* targets, const ts::Options& opts) {
    const std::int64_t n = logits.rows();
    Column<Real> entropy(n), logprob(n), logsumexp(n), max_logprob(n), margin(n);
    Ids argmax(n), rank(n);
    const ts::Stats<Real> out{entropy.mutable_data(),   logprob.mutable_data(),
                              logsumexp.mutable_data(), max_logprob.mutable_data(),
                              margin.mutable_data(),    argmax.mutable_data(),
                              rank.mutable_data()};
    {
        const py::gil_scoped_release release;
        ts::compute(logits, targets, opts, out);
    }
    return py::make_tuple(entropy, logprob, logsumexp, max_logprob, argmax, margin, rank);
}

template <class Real>
py::tuple compute_partials(const ts::Logits& logits, const std::int64_t* targets,
                           const py::object& target_logits, const ts::Options& opts) {
    const std::int64_t n = logits.rows();
    MaybeColumn<Real> given;
    if (!target_logits.is_none()) given = target_logits.cast<Column<Real>>();
    const Real* const logit = column(given, n, "target_logits");
    if ((targets == nullptr) != (logit == nullptr)) {
        throw py::value_error("targets and target_logits must be given together");
    }
    Column<Real> max(n), second(n), sum(n), weighted(n);
    Ids argmax(n), rank(n);
    const ts::Partials<Real> out{max.mutable_data(),    second.mutable_data(),
                                 sum.mutable_data(),    weighted.mutable_data(),
                                 argmax.mutable_data(), rank.mutable_data()};
    {
        const py::gil_scoped_release release;
        ts::compute_partials(logits, targets, logit, opts, out);
    }
    return py::make_tuple(max, second, sum, weighted, argmax, rank);
}

template <class Real>
void accumulate(const ts::Logits& tile, const std::int64_t* targets,
                const py::object& target_logits, std::int64_t first_column, const ts::Options& opts,
                const ts::Partials<double>& total) {
    MaybeColumn<Real> given;
    if (!target_logits.is_none()) given = target_logits.cast<Column<Real>>();
    const Real* const logit = column(given, tile.rows(), "target_logits");
    if ((targets == nullptr) != (logit == nullptr)) {
        throw py::value_error("targets and target_logits must be given together");
    }
    const py::gil_scoped_release release;
    ts::accumulate(tile, targets, logit, first_column, opts, total);
}

// The rows of `values` [count, rows], which the caller owns and may be written to.
template <class T>
T* rows_of(py::array_t<T, py::array::c_style>& values, std::int64_t count, std::int64_t rows,
           const char* name) {
    if (values.ndim() != 2 || values.shape(0) != count || values.shape(1) != rows) {
        throw py::value_error(std::string(name) + " must be [" + std::to_string(count) + ", " +
                              std::to_string(rows) + "]");
    }
    return values.mutable_data();
}

template <class Real>
void backward(const ts::Logits& logits, const std::int64_t* targets, const ts::Options& opts,
              const py::tuple& gradients, const py::tuple& forward, const Ids& argmax,
              const ts::Logits& out) {
    const std::int64_t n = logits.rows();
    if (gradients.size() != 4 || forward.size() != 2) {
        throw py::value_error("gradients must have 4 entries and forward 2");
    }
    const auto optional = [](const py::handle& h) {
        return h.is_none() ? MaybeColumn<Real>() : MaybeColumn<Real>(h.cast<Column<Real>>());
    };
    const MaybeColumn<Real> g[4] = {optional(gradients[0]), optional(gradients[1]),
                                    optional(gradients[2]), optional(gradients[3])};
    const MaybeColumn<Real> f[2] = {optional(forward[0]), optional(forward[1])};
    const ts::Gradients<Real> all{column(g[0], n, "entropy"),
                                  column(g[1], n, "logprob"),
                                  column(g[2], n, "logsumexp"),
                                  column(g[3], n, "max_logprob"),
                                  column(f[0], n, "entropy"),
                                  column(f[1], n, "max_logprob"),
                                  column(std::optional(argmax), n, "argmax")};
    const py::gil_scoped_release release;
    ts::backward(logits, targets, opts, all, out);
}

}  // namespace

void bind_token_stats(py::module_& module) {
    module.def("token_stats_isas", &ts::available);
    module.def(
        "token_stats",
        [](const py::array& logits, const std::optional<Ids>& targets, double temperature,
           double softcap, std::int64_t ignore_index, unsigned threads, const std::string& isa) {
            const ts::Logits x = view(logits);
            const std::int64_t* const t = column(targets, x.rows(), "targets");
            const ts::Options opts = options(temperature, softcap, ignore_index, threads, isa);
            return x.type == ts::Type::f64 ? compute<double>(x, t, opts)
                                           : compute<float>(x, t, opts);
        },
        py::arg("logits"), py::arg("targets"), py::arg("temperature"), py::arg("softcap"),
        py::arg("ignore_index"), py::arg("threads"), py::arg("isa") = "");
    module.def(
        "token_stats_partials",
        [](const py::array& logits, const std::optional<Ids>& targets,
           const py::object& target_logits, double temperature, double softcap, unsigned threads,
           const std::string& isa) {
            const ts::Logits x = view(logits);
            const std::int64_t* const t = column(targets, x.rows(), "targets");
            const ts::Options opts = options(temperature, softcap, 0, threads, isa);
            return x.type == ts::Type::f64 ? compute_partials<double>(x, t, target_logits, opts)
                                           : compute_partials<float>(x, t, target_logits, opts);
        },
        py::arg("logits"), py::arg("targets"), py::arg("target_logits"), py::arg("temperature"),
        py::arg("softcap"), py::arg("threads"), py::arg("isa") = "");
    module.def(
        "token_stats_accumulate",
        [](py::array& tile, const std::optional<Ids>& targets, const py::object& target_logits,
           std::int64_t first_column, double temperature, double softcap, unsigned threads,
           Column<double>& reals, Ids& counts, const std::string& isa) {
            const ts::Logits x = view(tile);
            const std::int64_t n = x.rows();
            const std::int64_t* const t = column(targets, n, "targets");
            const ts::Options opts = options(temperature, softcap, 0, threads, isa);
            if (!tile.writeable()) throw py::value_error("tile must be writable");
            double* const real = rows_of(reals, 4, n, "reals");
            std::int64_t* const count = rows_of(counts, 2, n, "counts");
            const ts::Partials<double> total{real,         real + n, real + 2 * n,
                                             real + 3 * n, count,    count + n};
            if (x.type == ts::Type::f64) {
                accumulate<double>(x, t, target_logits, first_column, opts, total);
            } else {
                accumulate<float>(x, t, target_logits, first_column, opts, total);
            }
        },
        py::arg("tile"), py::arg("targets"), py::arg("target_logits"), py::arg("first_column"),
        py::arg("temperature"), py::arg("softcap"), py::arg("threads"),
        py::arg("reals").noconvert(), py::arg("counts").noconvert(), py::arg("isa") = "");
    module.def(
        "token_stats_backward",
        [](const py::array& logits, const std::optional<Ids>& targets, double temperature,
           double softcap, std::int64_t ignore_index, unsigned threads, const py::tuple& gradients,
           const py::tuple& forward, const Ids& argmax, py::array& out, const std::string& isa) {
            const ts::Logits x = view(logits), to = view(out);
            if (!out.writeable() || to.type != x.type || to.outer != x.outer ||
                to.inner != x.inner || to.vocab != x.vocab) {
                throw py::value_error("out must be writable, shaped and typed like logits");
            }
            const std::int64_t* const t = column(targets, x.rows(), "targets");
            const ts::Options opts = options(temperature, softcap, ignore_index, threads, isa);
            if (x.type == ts::Type::f64) {
                backward<double>(x, t, opts, gradients, forward, argmax, to);
            } else {
                backward<float>(x, t, opts, gradients, forward, argmax, to);
            }
        },
        py::arg("logits"), py::arg("targets"), py::arg("temperature"), py::arg("softcap"),
        py::arg("ignore_index"), py::arg("threads"), py::arg("gradients"), py::arg("forward"),
        py::arg("argmax"), py::arg("out"), py::arg("isa") = "");
}

}  // namespace robustft
