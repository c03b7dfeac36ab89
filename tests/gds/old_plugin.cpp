// A plugin of another build.
#include "copy/gds_plugin.h"

extern "C" __attribute__((visibility("default"))) const LmcnGdsPlugin* lmcn_gds_plugin(void) {
  static constexpr LmcnGdsPlugin kOld{
      LMCN_GDS_PLUGIN_ABI, "0.0.1", "", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return &kOld;
}
