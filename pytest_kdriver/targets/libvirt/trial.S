# What a kernel needs of a processor, tried in a few hundred instructions. trial.bin is this, assembled:
#
#     as -o trial.o trial.S && objcopy -O binary trial.o trial.bin
#
# It is the last KiB of a machine's firmware. It goes from reset to long mode with identity paging and, in this
# order, does `lock cmpxchg16b`, int3 through an IDT with an iretq back, and, where cpuid offers them, xsave and
# xrstor. Before each it writes a letter to the debug console (port 0xe9), and at the end 0x2a to the exit
# device (port 0xf4); 1, if a result is wrong. Whatever faults ends in a triple fault.

        .set RAM, 0x8000                # where the code runs, as a kernel's does: the firmware's memory is special
        .set TABLES, 0x1000             # page map, directory pointers, directory: a page each
        .set IDT, 0x4000
        .set OPERAND, 0x5000
        .set AREA, 0x6000               # of xsave
        .set STACK, 0x7ff0
        .set CODE, 8                    # selectors
        .set DATA, 16

        .macro step letter
        movb    $\letter, %al
        outb    %al, $0xe9
        .endm

        .text
        .code16
rom:                                    # F000:FC00
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $RAM, %di
        movw    %cs, %ax
        movw    %ax, %ds
        movw    $0xfc00, %si
        movw    $512, %cx
        rep movsw
        ljmp    $0, $RAM + (real - rom)
real:
        step    'r'
        xorl    %eax, %eax
        movw    %ax, %ds
        movw    %ax, %ss
        movw    $STACK, %sp
        movw    $TABLES, %di
        movw    $(STACK - TABLES) / 4, %cx
        rep stosl
        movl    $TABLES + 0x1003, TABLES                # present, writable
        movl    $TABLES + 0x2003, TABLES + 0x1000
        movl    $0x83, TABLES + 0x2000                  # and 2 MiB in one page
        movl    $0x220, %eax                            # PAE, OSFXSR
        movl    %eax, %cr4
        movl    $TABLES, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx                       # EFER
        rdmsr
        orl     $0x100, %eax                            # LME
        wrmsr
        lgdtl   RAM + (gdt_pointer - rom)
        movl    $0x80000013, %eax                       # PG, ET, MP, PE; no cache disabled, no emulation
        movl    %eax, %cr0
        ljmpl   $CODE, $RAM + (long - rom)

        .code64
long:
        movl    $DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $STACK, %esp
        step    'l'

        movl    $RAM + (breakpoint - rom), %eax
        movw    %ax, IDT + 3 * 16
        movw    $CODE, IDT + 3 * 16 + 2
        movw    $0x8e00, IDT + 3 * 16 + 4               # present, an interrupt gate
        lidt    RAM + (idt_pointer - rom)

        step    'c'
        movq    $1, OPERAND
        movq    $2, OPERAND + 8
        movl    $1, %eax
        movl    $2, %edx
        movl    $3, %ebx
        movl    $4, %ecx
        lock cmpxchg16b OPERAND
        jnz     wrong
        cmpq    $3, OPERAND
        jne     wrong
        cmpq    $4, OPERAND + 8
        jne     wrong

        step    'i'
        xorl    %esi, %esi
        int3
        cmpl    $1, %esi
        jne     wrong

        step    'x'
        movl    $1, %eax
        xorl    %ecx, %ecx
        cpuid
        btl     $26, %ecx                               # XSAVE
        jnc     right
        movq    %cr4, %rax
        orl     $0x40000, %eax                          # OSXSAVE
        movq    %rax, %cr4
        xorl    %ecx, %ecx
        xorl    %edx, %edx
        movl    $3, %eax                                # x87, SSE
        xsetbv
        movabsq $0x0123456789abcdef, %rbx
        movq    %rbx, %xmm5
        xsave64 AREA
        pxor    %xmm5, %xmm5
        xrstor64 AREA
        movq    %xmm5, %rdi
        cmpq    %rbx, %rdi
        jne     wrong

right:
        movb    $0x2a, %al
        jmp     end
wrong:
        movb    $1, %al
end:
        outb    %al, $0xf4
        hlt
        jmp     end

breakpoint:
        incl    %esi
        iretq

        .balign 8
gdt:
        .quad   0
        .quad   0x00209a0000000000                      # 64-bit code
        .quad   0x0000920000000000                      # data
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   RAM + (gdt - rom)
idt_pointer:
        .word   4 * 16 - 1
        .quad   IDT

        .code16
        .org    0x3f0
        ljmp    $0xf000, $0xfc00                        # the reset vector
        .org    0x400
