// Answer consistency for Python: argument checks and the GIL. No algorithm.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "answer_consistency.hpp"

namespace py = pybind11;

namespace robustft {
namespace {

using consistency::Clustering;
using consistency::Metric;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

Metric parse_metric(const std::string& name) {
    if (name == "exact") return Metric::exact;
    if (name == "token_f1") return Metric::token_f1;
    if (name == "lcs") return Metric::lcs;
    if (name == "edit") return Metric::edit;
    throw std::invalid_argument("metric must be exact, token_f1, lcs or edit, got " + name);
}

Clustering parse_rule(const std::string& name) {
    if (name == "components") return Clustering::components;
    if (name == "greedy") return Clustering::greedy;
    throw std::invalid_argument("clustering must be components or greedy, got " + name);
}

void check_shape(const py::array& array, const std::vector<py::ssize_t>& shape, const char* name) {
    if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
        throw std::invalid_argument(std::string(name) + " has the wrong shape");
    }
}

// Ctrl-C, from the calling thread.
void poll_signals(std::uint64_t) {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Array<float> pairwise(const Array<std::int32_t>& tokens, const Array<std::int64_t>& start,
                      const Array<std::int64_t>& length, const std::string& metric,
                      unsigned threads) {
    if (tokens.ndim() != 1 || start.ndim() != 2) {
        throw std::invalid_argument("tokens must be [T] and start [N, K]");
    }
    const py::ssize_t questions = start.shape(0), slots = start.shape(1);
    check_shape(length, {questions, slots}, "length");
    const Metric kind = parse_metric(metric);
    Array<float> agreement({questions, slots, slots});
    const consistency::Answers answers{
        tokens.data(), static_cast<std::size_t>(tokens.size()), start.data(),
        length.data(), static_cast<std::size_t>(questions),     static_cast<std::size_t>(slots)};
    float* out = agreement.mutable_data();
    Monitor monitor(poll_signals);
    {
        const py::gil_scoped_release release;
        consistency::pairwise(answers, kind, out, threads, monitor);
    }
    return agreement;
}

py::tuple summarise(const Array<float>& agreement, const Array<bool>& present,
                    const std::optional<Array<double>>& weight, double threshold,
                    const std::string& clustering, unsigned threads) {
    if (present.ndim() != 2) throw std::invalid_argument("present must be [N, K]");
    const py::ssize_t questions = present.shape(0), slots = present.shape(1);
    check_shape(agreement, {questions, slots, slots}, "agreement");
    if (weight) check_shape(*weight, {questions, slots}, "weight");
    const std::vector<py::ssize_t> per_answer{questions, slots}, per_question{questions};
    Array<float> mean(per_answer), fraction(per_question), entropy(per_question);
    Array<std::int64_t> cluster(per_answer), majority(per_question);
    const consistency::Votes votes{agreement.data(),
                                   reinterpret_cast<const std::uint8_t*>(present.data()),
                                   weight ? weight->data() : nullptr,
                                   static_cast<std::size_t>(questions),
                                   static_cast<std::size_t>(slots),
                                   static_cast<float>(threshold),
                                   parse_rule(clustering)};
    const consistency::Summary summary{mean.mutable_data(), cluster.mutable_data(),
                                       majority.mutable_data(), fraction.mutable_data(),
                                       entropy.mutable_data()};
    Monitor monitor(poll_signals);
    {
        const py::gil_scoped_release release;
        consistency::summarise(votes, summary, threads, monitor);
    }
    return py::make_tuple(mean, cluster, majority, fraction, entropy);
}

}  // namespace

void bind_answer_consistency(py::module_& module) {
    module.def("consistency_pairwise", &pairwise, py::arg("tokens").noconvert(),
               py::arg("start").noconvert(), py::arg("length").noconvert(), py::arg("metric"),
               py::arg("threads"));
    module.def("consistency_summarise", &summarise, py::arg("agreement").noconvert(),
               py::arg("present").noconvert(), py::arg("weight").noconvert(), py::arg("threshold"),
               py::arg("clustering"), py::arg("threads"));
    module.def("consistency_instruction_set", &consistency::instruction_set);
    module.def("consistency_force_instruction_set", &consistency::force_instruction_set,
               py::arg("name"));
}

}  // namespace robustft
