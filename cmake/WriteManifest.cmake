# Writes what was built, and with what, where setup.py picks it up.
function(write_manifest path)
  if(SORTED_KERNELS_CUDA)
    set(cuda true)
    string(REPLACE ";" "\", \"" archs "${SORTED_KERNELS_ARCHS}")
    set(archs "[\"${archs}\"]")
    set(nvcc "\"${CMAKE_CUDA_COMPILER_VERSION}\"")
  else()
    set(cuda false)
    set(archs "[]")
    set(nvcc null)
  endif()
  file(CONFIGURE OUTPUT "${path}" CONTENT [[{
  "cuda": @cuda@,
  "archs": @archs@,
  "nvcc": @nvcc@,
  "cxx": "@CMAKE_CXX_COMPILER_ID@ @CMAKE_CXX_COMPILER_VERSION@",
  "torch": "@SORTED_KERNELS_TORCH_VERSION@",
  "version": "@PROJECT_VERSION@"
}
]] @ONLY)
endfunction()
