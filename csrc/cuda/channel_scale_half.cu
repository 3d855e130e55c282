#include "channel_scale.cuh"

namespace visattn::cuda {

template void launch_channel_scale<Half>(const char*, ChannelForward<PlainMemory, Half>&, const Plan&, bool,
                                         float*, const Call&);
template void launch_channel_scale<Half>(const char*, ChannelBackward<PlainMemory, Half>&, const Plan&, bool,
                                         float*, const Call&);

}  // namespace visattn::cuda
