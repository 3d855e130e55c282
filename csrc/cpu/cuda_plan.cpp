// csrc/common/plan.h for Python: says without a GPU which CUDA kernel serves a shape.
#include <cstdint>

#include "../common/geometry.h"
#include "../common/plan.h"

namespace visattn::cuda {

struct PlanQuestion {
  int64_t N, C, P, R, element, nhwc, backward, W, window, sm, count, shared_bytes, l2_bytes;
};

struct PlanAnswer {
  int64_t variant, access, team, teams, held, stages, threads, shared_bytes, one_launch;
  const char* why;
};

extern "C" __attribute__((visibility("default"))) void visattn_fast_cuda_plan(const PlanQuestion* q,
                                                                              PlanAnswer* out) {
  const Device d{static_cast<int>(q->sm), static_cast<int>(q->count), static_cast<int>(q->shared_bytes),
                 q->l2_bytes};
  const Plan p = plan({q->N, q->C, q->P, q->R, q->C * q->P, static_cast<int>(q->element), q->nhwc != 0, true,
                       q->backward != 0, static_cast<int>(q->W), static_cast<int>(q->window)},
                      d);
  const Geometry& g = p.geometry;
  *out = {p.variant, p.access,  g.team,         p.teams,      g.held,
          g.stages,  p.threads, p.shared_bytes, p.one_launch, p.why};
}

}  // namespace visattn::cuda
