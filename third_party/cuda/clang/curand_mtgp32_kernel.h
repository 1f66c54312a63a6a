/* Empty on purpose. clang's CUDA wrapper includes cuRAND's header of this name
 * to fix its macros; no kernel here draws random numbers. */
