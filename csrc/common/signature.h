// The declared arguments of an op, and the check of every call in front of its kernel: no kernel reads a
// pointer before it. The declarations come from visattn_fast/ops/signature.py, as a table of numbers that is
// explained there, when Python has loaded the library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tensor.h"

namespace visattn {

// One argument of a call: a tensor, or null if it is None; or a number.
struct Value {
  Tensor* tensor = nullptr;
  int64_t integer = 0;
  double number = 0;

  explicit Value(Tensor& t) : tensor(&t) {}
  explicit Value(std::optional<Tensor>& t) : tensor(t ? &*t : nullptr) {}
  explicit Value(int64_t i) : integer(i), number(static_cast<double>(i)) {}
  explicit Value(bool b) : Value(int64_t{b}) {}
  explicit Value(double d) : number(d) {}
};

class Signature {
 public:
  // Reads the declaration. `text` has the name of the op, the letters, and for each argument its name and what
  // it must be, in lines.
  void declare(const std::string& text, const int64_t* table);

  // Throws unless the arguments are as declared. Replaces tensors of another layout than declared by copies.
  void check(Value* values, int64_t count) const;

 private:
  struct Step {
    int64_t operation, operand;
  };
  using Program = std::vector<Step>;
  struct Size {
    int64_t least, defines;  // the variable that this size defines, or -1
    Program program;
  };
  struct Argument {
    std::string name, text;
    int64_t kind, position;
    // a tensor
    int64_t dtype, dtype_of, layout, lines_of, partner;
    bool extends, ellipsis;
    std::vector<Size> sizes;
    // a number, or the range of a letter, which is a variable
    int64_t variable;
    bool integer;
    std::vector<Program> low, high, values;  // one or none of low and high
  };

  void check_tensor(const Argument& a, Value* values, int64_t* variables) const;
  void check_shape(const Argument& a, const Tensor& t, int64_t* variables) const;
  void check_indices(const Argument& a, const Tensor& t, const int64_t* variables) const;
  void check_number(const Argument& a, const Value* values, int64_t* variables) const;
  [[noreturn]] void fail_partner(const Argument& a) const;
  [[noreturn]] void fail_number(const Argument& a, double number, const int64_t* variables) const;
  [[noreturn]] void fail_shape(const Argument& a, const Tensor& t, const int64_t* variables) const;

  std::string name_;
  std::vector<std::string> letters_;
  int64_t leading_ = 0;
  std::vector<Argument> arguments_;
};

// The signature of the op, to be declared. Created at the first call for this name.
Signature& signature_of(const std::string& name);

// A kernel with the check in front of it.
template <class F, F* kernel>
struct Checked;

template <class R, class... Args, R (*kernel)(Args...)>
struct Checked<R(Args...), kernel> {
  static inline const Signature* signature = nullptr;

  static R call(Args... args) {
    Value values[] = {Value(args)...};
    signature->check(values, sizeof...(Args));
    return kernel(std::move(args)...);
  }
};

// Registers a kernel for the op of this name.
template <auto kernel>
void implement(torch::stable::detail::StableLibrary& library, const char* name) {
  using Kernel = Checked<std::remove_pointer_t<decltype(kernel)>, kernel>;
  Kernel::signature = &signature_of(name);
  library.impl(name, TORCH_BOX(&Kernel::call));
}

}  // namespace visattn
