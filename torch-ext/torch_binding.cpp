// The ops of csrc/cuda under the name that Hugging Face's kernel builder gives a build; the builder writes registration.h.
#include <torch/csrc/stable/library.h>

#include "registration.h"
#include "schemas.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, m) {
  for (const char* schema : refrag::kSchemas) m.def(schema);
  for (const char* schema : refrag::kCudaSchemas) m.def(schema);
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
