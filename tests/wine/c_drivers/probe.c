/*
 * probe: a WDM driver as people write them in C, which does on request what drivers do: answer at once or
 * later, never, or too late; set timers, queue work, take pool by each routine there is.
 *
 * \\.\probe takes reads and writes (a read gives what was last written) and the control codes below.
 */

#include <ntddk.h>

#define PROBE_CODE(function) CTL_CODE(FILE_DEVICE_UNKNOWN, 0x800 + (function), METHOD_BUFFERED, FILE_ANY_ACCESS)

enum {
    INVERT = PROBE_CODE(0),       /* the output is the input, each byte inverted */
    FAIL = PROBE_CODE(1),         /* FAIL_INPUT: completes with this status and count, bytes 0xEE */
    PEND = PROBE_CODE(2),         /* pends until cancelled */
    KEEP = PROBE_CODE(3),         /* pends, and takes no notice of a cancel */
    GIVE_BACK = PROBE_CODE(4),    /* completes all that KEEP has; the output is their number, a ULONG */
    TIMER = PROBE_CODE(5),        /* ULONG milliseconds: completed by a timer's DPC */
    WORK = PROBE_CODE(6),         /* completed by a work item */
    HANG = PROBE_CODE(7),         /* never returns */
    POOL = PROBE_CODE(8),         /* POOL_INPUT: allocates a block */
    LOOKASIDE = PROBE_CODE(9),    /* ULONG size: takes an entry of a lookaside list, and keeps it */
    CREATES = PROBE_CODE(10)      /* NTSTATUS: IRP_MJ_CREATE now completes with this; STATUS_PENDING: never */
};

typedef struct {
    NTSTATUS status;
    ULONG count;
} FAIL_INPUT;

typedef enum {
    ALLOCATE_POOL,
    ALLOCATE_POOL_WITH_TAG,
    ALLOCATE_POOL_WITH_QUOTA,
    ALLOCATE_POOL_WITH_QUOTA_TAG,
    ALLOCATE_POOL_2
} ALLOCATE_ROUTINE;

typedef struct {
    ULONG routine; /* ALLOCATE_ROUTINE */
    ULONG size;
    ULONG tag;
    ULONG freed; /* 0: kept; 1: ExFreePool; 2: ExFreePoolWithTag */
} POOL_INPUT;

/* Not from the pool: Wine still writes to a timer when its DPC has returned, so that may not free it. */
typedef struct {
    KTIMER timer;
    KDPC dpc;
    PVOID irp; /* NULL: nobody's */
} DELAYED_IRP;

typedef struct {
    PIO_WORKITEM item;
    PIRP irp;
} WORK_IRP;

typedef PVOID(NTAPI *ALLOCATE_POOL_2_ROUTINE)(ULONG64 flags, SIZE_T size, ULONG tag);

#define PROBE_TAG 0x626F7270 /* "prob" */

static DRIVER_DISPATCH Create, Close, Read, Write, Control;
static DRIVER_UNLOAD Unload;
static DRIVER_CANCEL Cancel;
static KDEFERRED_ROUTINE TimerDpc;
static IO_WORKITEM_ROUTINE Work;
DRIVER_INITIALIZE DriverEntry;

static UNICODE_STRING DeviceName = RTL_CONSTANT_STRING(L"\\Device\\Probe");
static UNICODE_STRING LinkName = RTL_CONSTANT_STRING(L"\\??\\probe");

static KSPIN_LOCK KeptLock;
static LIST_ENTRY Kept;
static UCHAR Written[4096];
static ULONG WrittenLength;
static DELAYED_IRP Delayed[8];
static KEVENT Never;
static NTSTATUS CreateStatus;
static NPAGED_LOOKASIDE_LIST Lookaside;

/* Points the relocations of an image that has them: somebody has to have applied them. */
static UCHAR *const volatile WrittenPointer = Written;

static NTSTATUS Complete(PIRP irp, NTSTATUS status, ULONG_PTR information)
{
    irp->IoStatus.Status = status;
    irp->IoStatus.Information = information;
    IoCompleteRequest(irp, IO_NO_INCREMENT);
    return status;
}

static VOID WaitForEver(VOID)
{
    KeWaitForSingleObject(&Never, Executive, KernelMode, FALSE, NULL);
}

static NTSTATUS NTAPI Create(PDEVICE_OBJECT device, PIRP irp)
{
    UNREFERENCED_PARAMETER(device);
    DbgPrint("probe: create\n");
    if (CreateStatus == STATUS_PENDING)
        WaitForEver();
    return Complete(irp, CreateStatus, 0);
}

static NTSTATUS NTAPI Close(PDEVICE_OBJECT device, PIRP irp)
{
    UNREFERENCED_PARAMETER(device);
    DbgPrint("probe: close\n");
    return Complete(irp, STATUS_SUCCESS, 0);
}

static NTSTATUS NTAPI Read(PDEVICE_OBJECT device, PIRP irp)
{
    ULONG length = IoGetCurrentIrpStackLocation(irp)->Parameters.Read.Length;

    UNREFERENCED_PARAMETER(device);
    if (length > WrittenLength)
        length = WrittenLength;
    RtlCopyMemory(irp->AssociatedIrp.SystemBuffer, WrittenPointer, length);
    return Complete(irp, STATUS_SUCCESS, length);
}

static NTSTATUS NTAPI Write(PDEVICE_OBJECT device, PIRP irp)
{
    ULONG length = IoGetCurrentIrpStackLocation(irp)->Parameters.Write.Length;

    UNREFERENCED_PARAMETER(device);
    if (length > sizeof(Written))
        return Complete(irp, STATUS_INVALID_PARAMETER, 0);
    RtlCopyMemory(WrittenPointer, irp->AssociatedIrp.SystemBuffer, length);
    WrittenLength = length;
    return Complete(irp, STATUS_SUCCESS, length);
}

static VOID NTAPI Cancel(PDEVICE_OBJECT device, PIRP irp)
{
    UNREFERENCED_PARAMETER(device);
    IoReleaseCancelSpinLock(irp->CancelIrql);
    DbgPrint("probe: cancelled\n");
    Complete(irp, STATUS_CANCELLED, 0);
}

static NTSTATUS Pend(PIRP irp)
{
    IoMarkIrpPending(irp);
    IoSetCancelRoutine(irp, Cancel);
    if (irp->Cancel && IoSetCancelRoutine(irp, NULL) != NULL) {
        /* It was cancelled before the routine was there to hear of it. */
        Complete(irp, STATUS_CANCELLED, 0);
    }
    return STATUS_PENDING;
}

static NTSTATUS Keep(PIRP irp)
{
    KIRQL irql;

    IoMarkIrpPending(irp);
    KeAcquireSpinLock(&KeptLock, &irql);
    InsertTailList(&Kept, &irp->Tail.Overlay.ListEntry);
    KeReleaseSpinLock(&KeptLock, irql);
    return STATUS_PENDING;
}

static ULONG GiveBack(VOID)
{
    ULONG count = 0;
    PLIST_ENTRY entry;
    KIRQL irql;

    KeAcquireSpinLock(&KeptLock, &irql);
    while (!IsListEmpty(&Kept)) {
        entry = RemoveHeadList(&Kept);
        KeReleaseSpinLock(&KeptLock, irql);
        Complete(CONTAINING_RECORD(entry, IRP, Tail.Overlay.ListEntry), STATUS_SUCCESS, 0);
        ++count;
        KeAcquireSpinLock(&KeptLock, &irql);
    }
    KeReleaseSpinLock(&KeptLock, irql);
    return count;
}

static VOID NTAPI TimerDpc(PKDPC dpc, PVOID context, PVOID unused1, PVOID unused2)
{
    DELAYED_IRP *delayed = context;

    UNREFERENCED_PARAMETER(dpc);
    UNREFERENCED_PARAMETER(unused1);
    UNREFERENCED_PARAMETER(unused2);
    DbgPrint("probe: timer\n");
    Complete(InterlockedExchangePointer(&delayed->irp, NULL), STATUS_SUCCESS, 0);
}

static NTSTATUS Delay(PIRP irp, ULONG milliseconds)
{
    LARGE_INTEGER due;
    ULONG index;

    due.QuadPart = -10000LL * milliseconds;
    for (index = 0; index < RTL_NUMBER_OF(Delayed); ++index) {
        DELAYED_IRP *delayed = &Delayed[index];

        if (InterlockedCompareExchangePointer(&delayed->irp, irp, NULL) != NULL)
            continue;
        IoMarkIrpPending(irp);
        KeSetTimer(&delayed->timer, due, &delayed->dpc);
        return STATUS_PENDING;
    }
    return Complete(irp, STATUS_INSUFFICIENT_RESOURCES, 0);
}

static VOID NTAPI Work(PDEVICE_OBJECT device, PVOID context)
{
    WORK_IRP *work = context;

    UNREFERENCED_PARAMETER(device);
    DbgPrint("probe: work\n");
    Complete(work->irp, STATUS_SUCCESS, 0);
    IoFreeWorkItem(work->item);
    ExFreePoolWithTag(work, PROBE_TAG);
}

static NTSTATUS QueueWork(PDEVICE_OBJECT device, PIRP irp)
{
    WORK_IRP *work = ExAllocatePoolWithTag(NonPagedPool, sizeof(*work), PROBE_TAG);

    if (work == NULL)
        return Complete(irp, STATUS_INSUFFICIENT_RESOURCES, 0);
    work->irp = irp;
    work->item = IoAllocateWorkItem(device);
    if (work->item == NULL) {
        ExFreePoolWithTag(work, PROBE_TAG);
        return Complete(irp, STATUS_INSUFFICIENT_RESOURCES, 0);
    }
    IoMarkIrpPending(irp);
    IoQueueWorkItem(work->item, Work, DelayedWorkQueue, work);
    return STATUS_PENDING;
}

static PVOID Allocate(ULONG routine, SIZE_T size, ULONG tag, NTSTATUS *status)
{
    UNICODE_STRING name = RTL_CONSTANT_STRING(L"ExAllocatePool2");
    ALLOCATE_POOL_2_ROUTINE allocate_pool_2;
    PVOID block = NULL;

    *status = STATUS_INSUFFICIENT_RESOURCES;
    switch (routine) {
    case ALLOCATE_POOL:
        block = ExAllocatePool(NonPagedPool, size);
        break;
    case ALLOCATE_POOL_WITH_TAG:
        block = ExAllocatePoolWithTag(PagedPool, size, tag);
        break;
    case ALLOCATE_POOL_WITH_QUOTA:
        block = ExAllocatePoolWithQuota(NonPagedPool, size);
        break;
    case ALLOCATE_POOL_WITH_QUOTA_TAG:
        block = ExAllocatePoolWithQuotaTag(PagedPool, size, tag);
        break;
    case ALLOCATE_POOL_2: /* newer than most systems that a driver still runs on */
        allocate_pool_2 = (ALLOCATE_POOL_2_ROUTINE)MmGetSystemRoutineAddress(&name);
        if (allocate_pool_2 == NULL)
            *status = STATUS_NOT_IMPLEMENTED;
        else
            block = allocate_pool_2(0x40 /* POOL_FLAG_NON_PAGED */, size, tag);
        break;
    default:
        *status = STATUS_INVALID_PARAMETER;
    }
    return block;
}

static NTSTATUS UsePool(const POOL_INPUT *input)
{
    NTSTATUS status;
    PVOID block = Allocate(input->routine, input->size, input->tag, &status);

    if (block == NULL)
        return status;
    if (input->freed == 1)
        ExFreePool(block);
    else if (input->freed == 2)
        ExFreePoolWithTag(block, input->tag);
    return STATUS_SUCCESS;
}

static NTSTATUS UseLookaside(ULONG size)
{
    ExInitializeNPagedLookasideList(&Lookaside, NULL, NULL, 0, size, PROBE_TAG, 0);
    return ExAllocateFromNPagedLookasideList(&Lookaside) == NULL ? STATUS_INSUFFICIENT_RESOURCES : STATUS_SUCCESS;
}

static NTSTATUS NTAPI Control(PDEVICE_OBJECT device, PIRP irp)
{
    PIO_STACK_LOCATION stack = IoGetCurrentIrpStackLocation(irp);
    ULONG input_length = stack->Parameters.DeviceIoControl.InputBufferLength;
    ULONG output_length = stack->Parameters.DeviceIoControl.OutputBufferLength;
    PVOID buffer = irp->AssociatedIrp.SystemBuffer;
    UCHAR *bytes = buffer;
    ULONG least = 0;
    ULONG index;

    switch (stack->Parameters.DeviceIoControl.IoControlCode) {
    case FAIL: least = sizeof(FAIL_INPUT); break;
    case POOL: least = sizeof(POOL_INPUT); break;
    case TIMER: case LOOKASIDE: case CREATES: least = sizeof(ULONG); break;
    default: break;
    }
    if (input_length < least)
        return Complete(irp, STATUS_INVALID_PARAMETER, 0);
    switch (stack->Parameters.DeviceIoControl.IoControlCode) {
    case INVERT:
        if (output_length < input_length)
            return Complete(irp, STATUS_BUFFER_TOO_SMALL, 0);
        for (index = 0; index < input_length; ++index)
            bytes[index] = (UCHAR)~bytes[index];
        return Complete(irp, STATUS_SUCCESS, input_length);
    case FAIL: {
        FAIL_INPUT fail = *(FAIL_INPUT *)buffer;
        for (index = 0; index < output_length; ++index)
            bytes[index] = 0xEE;
        return Complete(irp, fail.status, fail.count);
    }
    case PEND:
        DbgPrint("probe: pend\n");
        return Pend(irp);
    case KEEP:
        DbgPrint("probe: keep\n");
        return Keep(irp);
    case GIVE_BACK:
        if (output_length < sizeof(ULONG))
            return Complete(irp, STATUS_BUFFER_TOO_SMALL, 0);
        *(ULONG *)buffer = GiveBack();
        return Complete(irp, STATUS_SUCCESS, sizeof(ULONG));
    case TIMER:
        return Delay(irp, *(ULONG *)buffer);
    case WORK:
        return QueueWork(device, irp);
    case HANG:
        DbgPrint("probe: hang\n");
        WaitForEver();
        return Complete(irp, STATUS_UNSUCCESSFUL, 0);
    case POOL:
        return Complete(irp, UsePool(buffer), 0);
    case LOOKASIDE:
        return Complete(irp, UseLookaside(*(ULONG *)buffer), 0);
    case CREATES:
        CreateStatus = *(NTSTATUS *)buffer;
        return Complete(irp, STATUS_SUCCESS, 0);
    default:
        return Complete(irp, STATUS_INVALID_DEVICE_REQUEST, 0);
    }
}

static VOID NTAPI Unload(PDRIVER_OBJECT driver)
{
    DbgPrint("probe: unload\n");
    GiveBack();
    IoDeleteSymbolicLink(&LinkName);
    IoDeleteDevice(driver->DeviceObject);
}

NTSTATUS NTAPI DriverEntry(PDRIVER_OBJECT driver, PUNICODE_STRING registry_path)
{
    PDEVICE_OBJECT device;
    NTSTATUS status;
    ULONG index;

    UNREFERENCED_PARAMETER(registry_path);
    DbgPrint("probe: %s\n", "entry");
    KeInitializeSpinLock(&KeptLock);
    InitializeListHead(&Kept);
    KeInitializeEvent(&Never, NotificationEvent, FALSE);
    for (index = 0; index < RTL_NUMBER_OF(Delayed); ++index) {
        KeInitializeTimer(&Delayed[index].timer);
        KeInitializeDpc(&Delayed[index].dpc, TimerDpc, &Delayed[index]);
    }
    driver->DriverUnload = Unload;
    driver->MajorFunction[IRP_MJ_CREATE] = Create;
    driver->MajorFunction[IRP_MJ_CLOSE] = Close;
    driver->MajorFunction[IRP_MJ_READ] = Read;
    driver->MajorFunction[IRP_MJ_WRITE] = Write;
    driver->MajorFunction[IRP_MJ_DEVICE_CONTROL] = Control;
    status = IoCreateDevice(driver, 0, &DeviceName, FILE_DEVICE_UNKNOWN, 0, FALSE, &device);
    if (!NT_SUCCESS(status))
        return status;
    device->Flags |= DO_BUFFERED_IO;
    status = IoCreateSymbolicLink(&LinkName, &DeviceName);
    if (!NT_SUCCESS(status)) {
        IoDeleteDevice(device);
        return status;
    }
    device->Flags &= ~DO_DEVICE_INITIALIZING;
    return STATUS_SUCCESS;
}
