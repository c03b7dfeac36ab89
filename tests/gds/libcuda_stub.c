/* test-only libcuda.so.1: every call answers CUDA_ERROR_NOT_INITIALIZED, so kvikio treats all memory as host */
int cuMemHostAlloc(void) {
  return 3;
}
int cuMemFreeHost(void) {
  return 3;
}
int cuMemHostRegister_v2(void) {
  return 3;
}
int cuMemHostUnregister(void) {
  return 3;
}
int cuMemcpyHtoDAsync_v2(void) {
  return 3;
}
int cuMemcpyDtoHAsync_v2(void) {
  return 3;
}
int cuMemcpyAsync(void) {
  return 3;
}
int cuPointerGetAttribute(void) {
  return 3;
}
int cuPointerGetAttributes(void) {
  return 3;
}
int cuCtxCreate_v4(void) {
  return 3;
}
int cuCtxCreate_v2(void) {
  return 3;
}
int cuCtxDestroy_v2(void) {
  return 3;
}
int cuCtxPushCurrent_v2(void) {
  return 3;
}
int cuCtxPopCurrent_v2(void) {
  return 3;
}
int cuCtxGetCurrent(void) {
  return 3;
}
int cuCtxGetDevice(void) {
  return 3;
}
int cuMemGetAddressRange_v2(void) {
  return 3;
}
int cuGetErrorName(void) {
  return 3;
}
int cuGetErrorString(void) {
  return 3;
}
int cuDeviceGet(void) {
  return 3;
}
int cuDeviceGetCount(void) {
  return 3;
}
int cuDeviceGetAttribute(void) {
  return 3;
}
int cuDevicePrimaryCtxRetain(void) {
  return 3;
}
int cuDevicePrimaryCtxRelease_v2(void) {
  return 3;
}
int cuStreamSynchronize(void) {
  return 3;
}
int cuStreamCreate(void) {
  return 3;
}
int cuStreamDestroy_v2(void) {
  return 3;
}
int cuEventSynchronize(void) {
  return 3;
}
int cuEventCreate(void) {
  return 3;
}
int cuEventDestroy_v2(void) {
  return 3;
}
int cuEventRecord(void) {
  return 3;
}
int cuEventQuery(void) {
  return 3;
}
int cuLaunchHostFunc(void) {
  return 3;
}
int cuMemcpyBatchAsync(void) {
  return 3;
}
int cuMemcpyBatchAsync_v2(void) {
  return 3;
}
int cuStreamGetCtx(void) {
  return 3;
}
int cuInit(void) {
  return 3;
}
int cuDriverGetVersion(int* v) {
  *v = 12080;
  return 0;
}
