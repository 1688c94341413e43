# A guest in one sector. tiny_guest.bin is this, assembled:
#
#     as -o tiny_guest.o tiny_guest.S && objcopy -O binary tiny_guest.o tiny_guest.bin
#
# It greets on COM1 and on the screen, and then obeys bytes from COM1:
#     c  counts in memory; answers the count             k  what the count is
#     w  writes the count to the disk; answers W         r  answers what the disk has
#     t  faults, until the processor resets              s  shuts the machine down
# and sends back any other. The byte before the signature is a command that it obeys first.

        .set DATA, 0x7e00
        .set COM1, 0x3f8

        .code16
        .text
rom:
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        movb    %dl, DATA + 0x200
        movw    $512 / 2, %cx
        movw    $DATA, %di
        rep stosw
        movw    $0x7c00 + (greeting - rom), %si
greet:
        lodsb
        testb   %al, %al
        jz      first
        pushw   %si
        call    put
        movb    $0x0e, %ah              # teletype
        xorw    %bx, %bx
        int     $0x10
        popw    %si
        jmp     greet
first:
        movb    0x7c00 + 509, %al
        testb   %al, %al
        jnz     obey
next:
        call    get
obey:
        cmpb    $'c', %al
        je      count
        cmpb    $'k', %al
        je      tell
        cmpb    $'w', %al
        je      write
        cmpb    $'r', %al
        je      read
        cmpb    $'t', %al
        je      fault
        cmpb    $'s', %al
        je      shutdown
answer:
        call    put
        jmp     next

count:
        incb    DATA
tell:
        movb    DATA, %al
        jmp     answer
write:
        movw    $0x0301, %ax
        call    disk
        movb    $'W', %al
        jmp     answer
read:
        movb    DATA, %cl
        pushw   %cx
        movw    $0x0201, %ax
        call    disk
        movb    DATA, %al
        popw    %cx
        movb    %cl, DATA
        jmp     answer
fault:
        lidt    0x7c00 + (nothing - rom)
        int3
shutdown:
        movw    $0x604, %dx             # the q35's power management
        movw    $0x2000, %ax
        outw    %ax, %dx
        jmp     next

disk:                                   # the third sector
        movw    $3, %cx
        movb    DATA + 0x200, %dl
        xorb    %dh, %dh
        movw    $DATA, %bx
        int     $0x13
        ret

get:
        movw    $COM1 + 5, %dx
        inb     %dx, %al
        testb   $1, %al
        jz      get
        movw    $COM1, %dx
        inb     %dx, %al
        ret

put:
        movb    %al, %ah
        movw    $COM1 + 5, %dx
full:
        inb     %dx, %al
        testb   $0x20, %al
        jz      full
        movw    $COM1, %dx
        movb    %ah, %al
        outb    %al, %dx
        ret

nothing:
        .word   0
        .long   0
greeting:
        .asciz  "the tiny guest is up\r\n"

        .org    509
        .byte   0
        .word   0xaa55
