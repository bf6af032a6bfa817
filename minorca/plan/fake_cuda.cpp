// Lets autograd run on fake tensors of device cuda without a GPU: a guard that does nothing, and hooks that answer that
// devices exist.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <new>

namespace at {

struct FakeCUDAHooks final : CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<CPUGeneratorImpl>(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<DeviceType::CUDA>)
// importing torch has made the hooks, which have no members: others take their place
static auto* hooks = new (const_cast<CUDAHooksInterface*>(&detail::getCUDAHooks())) FakeCUDAHooks;

} // namespace at
