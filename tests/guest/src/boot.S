/* From the PVH entry (or a start-up interrupt) to ring 3, and the few things that ring 3 cannot do itself.
 *
 * All that runs at CPL 0 is here, and there is little of it: some hypervisors emulate kernel code, at a few million
 * instructions a second, and run user code natively. Memory is mapped one to one and belongs to ring 3, the
 * descriptor tables included, so that whatever is long is done there. */

.set MAX_CPUS, 16
.set KSTACK, 4096               /* at its base: the CPU's interrupt counters, see cpu.rs */
.set USTACK, 65536
.set TSS, 256                   /* with the I/O bitmap of the ports below 0x400 */
.set KCODE, 0x08
.set KDATA, 0x10
.set UCODE, 0x1b
.set UDATA, 0x23
.set KCODE32, 0x28
.set FIRST_TSS, 0x30
.set TOTAL, 0                   /* offsets in the counters */
.set BY_LINE, 4
.set EOI, 0xfee000b0

/* XEN_ELFNOTE_PHYS32_ENTRY: how PVH loaders find the entry. */
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad start32

.section .boot, "ax"
.code32
.globl start32
start32:                        /* paging off, flat segments, ebx: struct hvm_start_info */
    cli
    cld
    movl %ebx, start_info
    xorl %ebp, %ebp
enter_long_mode:                /* ebp: number of this CPU */
    lgdt gdtr
    movl $pml4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x620, %eax            /* PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE2 */
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax            /* EFER.LME */
    wrmsr
    movl %cr0, %eax
    andl $0xfffffffb, %eax      /* no EM */
    orl $0x80000033, %eax       /* PG, NE, ET, MP, PE */
    movl %eax, %cr0
    ljmp $KCODE, $long_mode

.code64
long_mode:
    movl $KDATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    lidt idtr
    /* The TSS of this CPU, its stack for interrupts, its descriptor. */
    movl %ebp, %edi
    shll $8, %edi
    leaq tss(%rdi), %rdi
    movl %ebp, %eax
    incl %eax
    shll $12, %eax
    leaq kstacks(%rax), %rax
    movq %rax, 4(%rdi)          /* rsp0 */
    movw $104, 102(%rdi)        /* I/O bitmap, all zeroes: allowed, also where a hypervisor forgets IOPL */
    movl %ebp, %edx
    shll $4, %edx
    leaq gdt+FIRST_TSS(%rdx), %rsi
    movl %edi, %ecx
    shll $16, %ecx
    orl $TSS-1, %ecx
    movl %ecx, (%rsi)           /* base 15:0, limit */
    movl %edi, %ecx
    shrl $16, %ecx
    andl $0xff, %ecx
    orl $0x8900, %ecx           /* present, 64-bit TSS */
    movl %edi, %eax
    andl $0xff000000, %eax
    orl %eax, %ecx
    movl %ecx, 4(%rsi)
    addl $FIRST_TSS, %edx
    ltr %dx
    movb $0xff, %al             /* the old interrupt controllers stay out of it; no other has been set up yet */
    outb %al, $0x21
    outb %al, $0xa1
    /* To ring 3, I/O privilege level 3, interrupts on: where they could not be turned on or off there. */
    movl %ebp, %eax
    incl %eax
    shll $16, %eax
    leaq ustacks-8(%rax), %rax
    movq $kstacks+KSTACK, %rsp
    movl %ebp, %edx
    shll $12, %edx
    addq %rdx, %rsp
    pushq $UDATA
    pushq %rax
    pushq $0x3202
    pushq $UCODE
    pushq $ring3
    movl %ebp, %edi
    movl start_info, %esi
    iretq

/* Where the other CPUs begin: copied to TRAMPOLINE, below 1 MiB, and sent there by a start-up interrupt. */
.set TRAMPOLINE, 0x8000
.globl ap_start, ap_end
.code16
ap_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    lgdtl TRAMPOLINE + (ap_gdtr - ap_start)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $KCODE32, $ap32
    .balign 4
ap_gdtr:
    .word gdt_end - gdt - 1
    .long gdt
ap_end:
.code32
ap32:
    movl $KDATA, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $1, %ebp
    lock xaddl %ebp, ap_count
    incl %ebp
    jmp enter_long_mode

.code64
/* A line has interrupted: counted on the page of this CPU's stack, and acknowledged to the local APIC. */
.macro line_entry number
    .balign 16
    pushq %rax
    movq %rsp, %rax
    andq $-KSTACK, %rax
    incl BY_LINE + 4*\number(%rax)
    incl TOTAL(%rax)
    movl $EOI, %eax
    movl $0, (%rax)
    popq %rax
    iretq
.endm
.globl line_entries, wait_entry, spurious_entry, fault_entries
    .balign 16
line_entries:                   /* LINE_ENTRY bytes each */
.set number, 0
.rept 25                        /* 24 pins of the I/O APIC, and the interrupt between CPUs */
    .balign 64
    line_entry number
    .set number, number + 1
.endr

/* int3: a software interrupt that every hypervisor passes on. Sleeps unless this CPU's interrupt count (at the base of the stack's page) has left %edi behind.
 * The interrupt gate has cleared IF, and hlt comes in the shadow of sti, so no interrupt is lost in between. */
    .balign 16
wait_entry:
    pushq %rax
    movq %rsp, %rax
    andq $-KSTACK, %rax
    cmpl TOTAL(%rax), %edi
    jne 1f
    sti
    hlt
    cli
1:  popq %rax
    iretq

spurious_entry:
    iretq

/* Exceptions: all registers are saved, and ring 3 is entered again to report them. */
.macro fault_entry number
    .balign 16
    .if (\number == 8) || (\number == 10) || (\number == 11) || (\number == 12) || (\number == 13) || (\number == 14) || (\number == 17) || (\number == 21) || (\number == 29) || (\number == 30)
    .else
    pushq $0
    .endif
    pushq $\number
    jmp fault
.endm
    .balign 16
fault_entries:
.set number, 0
.rept 32
    fault_entry number
    .set number, number + 1
.endr
fault:
    pushq %r15
    pushq %r14
    pushq %r13
    pushq %r12
    pushq %r11
    pushq %r10
    pushq %r9
    pushq %r8
    pushq %rbp
    pushq %rdi
    pushq %rsi
    pushq %rdx
    pushq %rcx
    pushq %rbx
    pushq %rax
    movq %cr2, %rax
    pushq %rax
    /* The frame is copied off the stack that the next interrupt uses. */
    movq %rsp, %rsi
    movq $fault_frame, %rdi
    movl $23, %ecx
    cld
    rep movsq
    movq $fault_frame, %rdi
    pushq $UDATA
    pushq $fault_stack_top - 8
    pushq $0x3202
    pushq $UCODE
    pushq $report_fault
    iretq

.section .tables, "aw"
.globl idt, kstacks, ap_count
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd + 7, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:                             /* 4 GiB, one to one, in pages of 2 MiB, for ring 3 */
.set page, 0
.rept 2048
    .quad (page << 21) + 0x87
    .set page, page + 1
.endr
idt:
    .fill 512, 8, 0             /* filled by ring 3 */
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* KCODE */
    .quad 0x00cf93000000ffff    /* KDATA */
    .quad 0x00affb000000ffff    /* UCODE */
    .quad 0x00cff3000000ffff    /* UDATA */
    .quad 0x00cf9b000000ffff    /* KCODE32 */
    .fill 2 * MAX_CPUS, 8, 0
gdt_end:
    .balign 8
    .word 0
gdtr:
    .word gdt_end - gdt - 1
    .quad gdt
    .balign 8
idtr:
    .word 4095
    .quad idt
start_info:
    .quad 0
ap_count:
    .long 0

.section .bss, "aw", @nobits
fault_frame:
    .skip 23 * 8
    .balign 4096
kstacks:
    .skip MAX_CPUS * KSTACK
ustacks:
    .skip MAX_CPUS * USTACK
    .skip 16384
fault_stack_top:
    .balign 256
tss:
    .skip MAX_CPUS * TSS
