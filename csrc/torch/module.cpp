// The Python module gpt_ext._C. Importing it registers the ops with torch; what it holds itself is
// no tensor: facts of the build, and the SIMD level. (pybind11's types are not shared with torch.)
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The version, the CUDA architectures and why there are none are macros that setup.py gives.
py::dict build_facts() {
  py::dict facts;
  facts["version"] = GPT_EXT_VERSION;
  facts["torch"] = TORCH_VERSION;
  facts["compiler"] = compiler();
#ifdef GPT_EXT_WITH_CUDA
  facts["with_cuda"] = true;
  facts["cuda_archs"] = GPT_EXT_CUDA_ARCHS;
  facts["no_cuda_reason"] = "";
#else
  facts["with_cuda"] = false;
  facts["cuda_archs"] = "";
  facts["no_cuda_reason"] = GPT_EXT_NO_CUDA_REASON;
#endif
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of gpt_ext: the ops of torch.ops.gpt_ext, and facts of this build.";
  m.def("build_facts", &build_facts, "Facts fixed at compile time.");
  m.def("compiled_simd_levels", &gpt_ext::cpu::compiled_simd_levels);
  m.def("supported_simd_levels", &gpt_ext::cpu::supported_simd_levels);
  m.def("simd_level", &gpt_ext::cpu::simd_level, "The SIMD level in use by the CPU kernels.");
  m.def("set_simd_level", &gpt_ext::cpu::set_simd_level, py::arg("name"),
        "Forces a SIMD level; RuntimeError if this CPU or build does not have it.");
}
