// The CUDA module, apart from the CPU's so that either builds without the other. Importing it registers its
// kernels.
#include <Python.h>

PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition{
      PyModuleDef_HEAD_INIT, "_cuda",
      "CUDA kernels of dp2vae_fast; importing it registers them with torch.ops.dp2vae_fast.", -1};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "BUILT_FOR", DP2VAE_CUDA_BUILD) != 0) Py_CLEAR(module);
  return module;
}
