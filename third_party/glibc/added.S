/* Symbols that glibc 2.28 lacks, for shared objects that must load with it.
 *
 * They are hidden: nothing else in the process sees them. What a shared object
 * does not use, --gc-sections drops.
 */

.macro hidden_function name
  .section .text.\name, "ax", @progbits
  .globl \name
  .hidden \name
  .type \name, @function
\name:
  endbr64
.endm

/* fstat, of glibc 2.33, was an inline function that called __fxstat with the
 * number of the struct's layout, on x86-64 always 1, before its own arguments. */
hidden_function fstat
  movq %rsi, %rdx
  movl %edi, %esi
  movl $1, %edi
  jmp *__fxstat@GOTPCREL(%rip)

/* What headers since glibc 2.38 call strtoll and strtoul: they know the binary
 * numbers of C23 too, which nobody here reads. */
hidden_function __isoc23_strtoll
  jmp *strtoll@GOTPCREL(%rip)
hidden_function __isoc23_strtoul
  jmp *strtoul@GOTPCREL(%rip)

/* __libc_single_threaded, of glibc 2.32: a char that tells libstdc++ to leave
 * out atomic operations while there is one thread. 0, always right, says that
 * there may be more. */
  .section .rodata.__libc_single_threaded, "a", @progbits
  .globl __libc_single_threaded
  .hidden __libc_single_threaded
  .type __libc_single_threaded, @object
__libc_single_threaded:
  .byte 0
  .size __libc_single_threaded, 1

  .section .note.GNU-stack, "", @progbits
