#include "signature.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace visattn {
namespace {

// As in visattn_fast/ops/signature.py.
enum Kind { kTensor, kNumber };
enum Dtype { kFloating, kSums, kAccumulation, kOfArgument, kInt32, kBool };
enum Layout { kStrided, kDense, kLines, kRows };
enum Operation { kConstant, kVariable, kAdd, kSubtract, kMultiply, kDivide };

// Throws what Python raises as RuntimeError, in the words of signature.py.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

constexpr int64_t kMostVariables = 24;
constexpr int64_t kDepth = 8;     // of an expression
constexpr int64_t kUnknown = -1;  // a letter without a size yet

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}

ScalarType accumulation_of(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Program>
int64_t value_of(const Program& program, const int64_t* variables) {
  if (program.size() == 1 && program[0].operation == kVariable) return variables[program[0].operand];
  int64_t stack[kDepth], top = 0;
  for (const auto& step : program) {
    if (step.operation == kConstant || step.operation == kVariable) {
      stack[top++] = step.operation == kConstant ? step.operand : variables[step.operand];
      continue;
    }
    const int64_t right = stack[--top];
    int64_t& left = stack[top - 1];
    if (step.operation == kAdd) left += right;
    if (step.operation == kSubtract) left -= right;
    if (step.operation == kMultiply && __builtin_mul_overflow(left, right, &left)) left = INT64_MAX;
    if (step.operation == kDivide) left /= right;
  }
  return stack[0];
}

// Lines [N, C, L] that are dense along C.
bool dense_along_channels(const Tensor& t) {
  const auto sizes = t.sizes();
  return has_strides(t, {sizes[1] * sizes[2], 1, sizes[1]});
}

Tensor as_lines(const Tensor& t, const Tensor& reference) {
  const bool inside = reference.dim() == 4 ? is_nhwc(reference)
                                           : !reference.is_contiguous() && dense_along_channels(reference);
  if (!inside) return as_contiguous(t);
  if (dense_along_channels(t)) return t;
  return torch::stable::transpose(torch::stable::contiguous(torch::stable::transpose(t, 1, 2)), 1, 2);
}

// Reads a table from front to back.
struct Reader {
  const int64_t* at;

  int64_t next() { return *at++; }

  template <class Program>
  Program program() {
    Program steps(static_cast<size_t>(next()));
    for (auto& step : steps) {
      step.operation = next();
      step.operand = next();
    }
    return steps;
  }

  template <class Program>
  std::vector<Program> programs() {
    std::vector<Program> found(static_cast<size_t>(next()));
    for (auto& each : found) each = program<Program>();
    return found;
  }
};

std::map<std::string, std::unique_ptr<Signature>>& signatures() {
  static std::map<std::string, std::unique_ptr<Signature>> all;
  return all;
}

}  // namespace

Signature& signature_of(const std::string& name) {
  auto& found = signatures()[name];
  if (!found) found = std::make_unique<Signature>();
  return *found;
}

void Signature::declare(const std::string& text, const int64_t* table) {
  std::istringstream lines(text);
  std::string letters, letter;
  std::getline(lines, name_);
  std::getline(lines, letters);
  letters_.clear();
  for (std::istringstream each(letters); each >> letter;) letters_.push_back(letter);
  if (static_cast<int64_t>(letters_.size()) > kMostVariables) refuse(name_, " has too many letters");
  Reader in{table};
  leading_ = in.next();
  arguments_.resize(static_cast<size_t>(in.next()));
  for (Argument& a : arguments_) {
    std::getline(lines, a.name);
    std::getline(lines, a.text);
    a.kind = in.next();
    a.position = in.next();
    if (a.kind == kTensor) {
      a.dtype = in.next(), a.dtype_of = in.next();
      a.layout = in.next(), a.lines_of = in.next();
      a.partner = in.next();
      a.extends = in.next() != 0, a.ellipsis = in.next() != 0;
      a.sizes.resize(static_cast<size_t>(in.next()));
      for (Size& size : a.sizes) {
        size.least = in.next(), size.defines = in.next();
        size.program = in.program<Program>();
      }
    } else {
      a.variable = in.next();
      a.integer = in.next() != 0;
    }
    a.low = in.programs<Program>();
    a.high = in.programs<Program>();
    a.values = in.programs<Program>();
  }
}

void Signature::check(Value* values, int64_t) const {
  if (name_.empty()) refuse("visattn_fast's native library was loaded without the package");
  int64_t variables[kMostVariables];
  std::fill_n(variables, letters_.size(), kUnknown);
  for (const Argument& a : arguments_) {
    if (a.kind == kNumber) {
      if (a.position < 0 && variables[a.variable] == kUnknown) continue;  // the letter's tensor is absent
      check_number(a, values, variables);
      continue;
    }
    const bool given = values[a.position].tensor;
    if (a.partner >= 0 && given != (values[a.partner].tensor != nullptr)) fail_partner(a);
    if (given) check_tensor(a, values, variables);
  }
}

void Signature::check_tensor(const Argument& a, Value* values, int64_t* variables) const {
  Tensor& t = *values[a.position].tensor;
  const Tensor& leading = *values[leading_].tensor;
  const ScalarType type = t.scalar_type();
  if (a.dtype == kFloating || a.dtype == kSums) {
    if (!(a.dtype == kFloating ? is_floating(type) : type == accumulation_of(type)))
      refuse(name_, ": ", a.name, " must have ",
             a.dtype == kFloating ? "a floating-point dtype" : "the dtype float32 or float64", ", got ",
             name_of(type));
  } else {
    const ScalarType wanted = a.dtype == kInt32          ? ScalarType::Int
                              : a.dtype == kBool         ? ScalarType::Bool
                              : a.dtype == kAccumulation ? accumulation_of(leading.scalar_type())
                                                         : values[a.dtype_of].tensor->scalar_type();
    if (type != wanted)
      refuse(name_, ": ", a.name, " must have the dtype ", name_of(wanted), ", got ", name_of(type));
  }
  if (&t != &leading && !(t.device() == leading.device()))
    refuse(name_, ": ", a.name, " must have the device of the first tensor");
  check_shape(a, t, variables);
  if (!a.high.empty() && t.is_cpu()) check_indices(a, t, variables);
  if (a.layout == kDense && !t.is_contiguous()) t = torch::stable::contiguous(t);
  if (a.layout == kRows && t.stride(t.dim() - 1) != 1) t = torch::stable::contiguous(t);
  if (a.layout == kLines) t = as_lines(t, *values[a.lines_of].tensor);
}

void Signature::check_shape(const Argument& a, const Tensor& t, int64_t* variables) const {
  const auto found = t.sizes();
  const int64_t dims = t.dim(), count = static_cast<int64_t>(a.sizes.size());
  bool fits = a.ellipsis || a.extends ? dims >= count : dims == count;
  for (int64_t d = count; fits && a.extends && d < dims; ++d) fits = found[d] == 1;
  const int64_t first = a.ellipsis ? dims - count : 0;
  for (int64_t d = 0; fits && d < count; ++d) {
    const Size& size = a.sizes[d];
    const int64_t actual = found[first + d];
    fits = actual >= size.least;
    if (!fits) break;
    if (size.defines < 0) {
      fits = actual == value_of(size.program, variables);
    } else if (size.program.size() == 1) {
      variables[size.defines] = actual;
    } else {  // the size is a linear function of the new letter
      variables[size.defines] = 0;
      const int64_t at0 = value_of(size.program, variables);
      variables[size.defines] = 1;
      const int64_t step = value_of(size.program, variables) - at0;
      fits = step > 0 && actual >= at0 && (actual - at0) % step == 0;
      variables[size.defines] = fits ? (actual - at0) / step : kUnknown;
    }
  }
  if (!fits) fail_shape(a, t, variables);
}

void Signature::check_indices(const Argument& a, const Tensor& t, const int64_t* variables) const {
  const Tensor dense = as_contiguous(t);
  const int64_t low = value_of(a.low[0], variables), high = value_of(a.high[0], variables), count = t.numel();
  const int32_t* index = data<const int32_t>(dense);
  int32_t least = 0, most = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = i ? std::min(least, index[i]) : index[i];
    most = i ? std::max(most, index[i]) : index[i];
  }
  if (count > 0 && (least < low || most > high))
    refuse(name_, ": ", a.name, " must have values in ", low, "..", high, ", got ", least, "..", most);
}

void Signature::check_number(const Argument& a, const Value* values, int64_t* variables) const {
  const bool given = a.position >= 0;
  const int64_t integer = given ? values[a.position].integer : variables[a.variable];
  const double number = given ? values[a.position].number : static_cast<double>(integer);
  bool fits = std::isfinite(number);
  if (!a.low.empty()) fits = fits && number >= static_cast<double>(value_of(a.low[0], variables));
  if (!a.high.empty()) fits = fits && number <= static_cast<double>(value_of(a.high[0], variables));
  if (!a.values.empty()) {
    fits = false;
    for (const Program& value : a.values) fits = fits || integer == value_of(value, variables);
  }
  if (!fits) fail_number(a, number, variables);
  if (given && a.integer) variables[a.variable] = integer;
}

void Signature::fail_partner(const Argument& a) const {
  std::string partner;
  for (const Argument& other : arguments_)
    if (other.position == a.partner) partner = other.name;
  refuse(name_, ": ", a.name, " must be given if and only if ", partner, " is");
}

void Signature::fail_number(const Argument& a, double number, const int64_t* variables) const {
  std::ostringstream wanted;
  for (const Program& value : a.values)
    wanted << (wanted.tellp() > 0 ? " or " : "") << value_of(value, variables);
  if (a.values.empty() && a.low.empty() && a.high.empty()) {
    wanted << "finite";
  } else if (a.values.empty()) {
    wanted << "in ";
    if (!a.low.empty()) wanted << value_of(a.low[0], variables);
    wanted << "..";
    if (!a.high.empty()) wanted << value_of(a.high[0], variables);
  }
  std::ostringstream got;
  a.integer ? got << static_cast<int64_t>(number) : got << number;
  refuse(name_, ": ", a.name, " must be ", wanted.str(), ", got ", got.str());
}

void Signature::fail_shape(const Argument& a, const Tensor& t, const int64_t* variables) const {
  std::ostringstream got, known;
  const auto sizes = t.sizes();
  for (int64_t d = 0; d < t.dim(); ++d) got << (d ? ", " : "") << sizes[d];
  for (size_t v = 0; v < letters_.size(); ++v) {
    bool named = false, defined = false;
    for (const Size& size : a.sizes) {
      defined = defined || size.defines == static_cast<int64_t>(v);
      for (const Step& step : size.program)
        named = named || (step.operation == kVariable && step.operand == static_cast<int64_t>(v));
    }
    if (named && !defined && variables[v] != kUnknown)
      known << (known.tellp() > 0 ? ", " : " with ") << letters_[v] << " = " << variables[v];
  }
  bool empty = false;
  for (int64_t d = 1; d < t.dim(); ++d) empty = empty || sizes[d] < 1;
  refuse(name_, ": ", a.name, " must have the shape [", a.text, "]", known.str(),
         empty ? ", none of them empty" : "", ", got [", got.str(), "]");
}

}  // namespace visattn

// Declares the arguments of an op, and of the kernel that has the check in front of it. Returns 0, or 1 if the table cannot be read.
extern "C" __attribute__((visibility("default"))) int visattn_declare(const char* name, const char* text,
                                                                      const int64_t* table) {
  try {
    visattn::signature_of(name).declare(text, table);
    return 0;
  } catch (...) {
    return 1;
  }
}
