// cuDNN's part of the null GPU: see runtime.cpp.

#include <cudnn.h>

#include <cstdlib>

#define API extern "C" __attribute__((visibility("default")))

extern "C" int null_gpu_library_call();

#define CREATES(name, type) \
    API cudnnStatus_t name(type* made) { return *made = (type)calloc(1, 256), CUDNN_STATUS_SUCCESS; }

CREATES(cudnnCreate, cudnnHandle_t)
CREATES(cudnnCreateActivationDescriptor, cudnnActivationDescriptor_t)
CREATES(cudnnCreateConvolutionDescriptor, cudnnConvolutionDescriptor_t)
CREATES(cudnnCreateDropoutDescriptor, cudnnDropoutDescriptor_t)
CREATES(cudnnCreateFilterDescriptor, cudnnFilterDescriptor_t)
CREATES(cudnnCreateTensorDescriptor, cudnnTensorDescriptor_t)

API size_t cudnnGetVersion() { return CUDNN_VERSION; }
API const char* cudnnGetErrorString(cudnnStatus_t) { return "null GPU"; }
API cudnnStatus_t cudnnGetProperty(libraryPropertyType part, int* value) {
    *value = part == MAJOR_VERSION ? CUDNN_MAJOR : part == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
    return CUDNN_STATUS_SUCCESS;
}

// The graph interface, through which torch plans and runs convolutions: one plan for everything, without a workspace.
API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t, cudnnBackendDescriptor_t* made) {
    return *made = (cudnnBackendDescriptor_t)calloc(1, 256), CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t, cudnnBackendAttributeName_t,
                                           cudnnBackendAttributeType_t type, int64_t wanted, int64_t* count, void* out) {
    if (count) *count = type == CUDNN_TYPE_BACKEND_DESCRIPTOR || type == CUDNN_TYPE_INT64;
    if (wanted > 0 && out && type == CUDNN_TYPE_INT64) *(int64_t*)out = 0;
    return CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t, cudnnBackendDescriptor_t) {
    null_gpu_library_call();
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnActivationDescriptor_t, size_t* bytes) {
    return *bytes = 0, CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnTensorDescriptor_t,
    const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t, const cudnnTensorDescriptor_t,
    const cudnnActivationDescriptor_t, size_t* bytes) {
    return *bytes = 0, CUDNN_STATUS_SUCCESS;
}
API cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(
    cudnnHandle_t, cudnnBatchNormMode_t, cudnnBatchNormOps_t, const cudnnActivationDescriptor_t,
    const cudnnTensorDescriptor_t, size_t* bytes) {
    return *bytes = 0, CUDNN_STATUS_SUCCESS;
}
