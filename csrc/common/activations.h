// The codes of activations, as the ops take them. visattn_fast/reference/activations.py has the same;
// tests/cpu/test_constants.py compares the two.
#pragma once

namespace visattn {

enum Activation : int { kNone = 0, kRelu = 1, kSilu = 2 };
enum GateActivation : int { kSigmoid = 0, kHardSigmoid = 1 };

}  // namespace visattn
