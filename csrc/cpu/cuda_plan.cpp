// csrc/cuda/plan.h for Python: which CUDA kernel a shape takes, told where there is no GPU.
#include "../cuda/plan.h"

namespace visattn::cuda {

struct PlanQuestion {
  int64_t N, C, P, R, element, nhwc, sm, count, shared_bytes, l2_bytes;
};

struct PlanAnswer {
  int64_t variant, access, team, teams, stages, threads, shared_bytes;
  const char* why;
};

extern "C" __attribute__((visibility("default"))) void visattn_fast_cuda_plan(const PlanQuestion* q,
                                                                              PlanAnswer* out) {
  const Device d{static_cast<int>(q->sm), static_cast<int>(q->count), static_cast<int>(q->shared_bytes),
                 q->l2_bytes};
  const Plan p =
      plan(q->N, q->C, q->P, q->R, q->C * q->P, static_cast<int>(q->element), q->nhwc != 0, true, d);
  *out = {p.variant, p.access, p.geometry.team, p.teams, p.geometry.stages, p.threads, p.shared_bytes, p.why};
}

}  // namespace visattn::cuda
