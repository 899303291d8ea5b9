# How generated assembly files say in ELF and in COFF (Windows) that data is read-only, and that a symbol stays inside the
# library: in COFF every symbol does that is not exported by name.
if(WIN32)
  set(FLASHSPARK_ASSEMBLY_BEGIN "  .section .rdata,\"dr\"\n")
  set(FLASHSPARK_ASSEMBLY_END "")
else()
  set(FLASHSPARK_ASSEMBLY_BEGIN "  .section .rodata\n")
  set(FLASHSPARK_ASSEMBLY_END "  .section .note.GNU-stack,\"\",%progbits\n")
endif()

# Sets `variable` to the label of a symbol that other files of the library see.
function(flashspark_label variable symbol)
  set(hidden "  .hidden ${symbol}\n")
  if(WIN32)
    set(hidden "")
  endif()
  set(${variable} "  .globl ${symbol}\n${hidden}${symbol}:\n" PARENT_SCOPE)
endfunction()
