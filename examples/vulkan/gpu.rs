//! A device: what it imports, what it is given to do, and the thread that hears of what is done.
//!
//! # Why this is sound
//! A handle of Vulkan is used only while it exists: an [`Import`] and the thread keep what they
//! were made from, an import goes when its last job has ended, and a [`Gpu`] when nothing is in
//! flight. What Vulkan calls externally synchronized (queue, command pool) is behind a mutex. What
//! a device *reads* is the program's memory, which may be replaced meanwhile: that is what this
//! example is about. It reads by itself, no reference of this program is involved, and the address
//! is never without a mapping while a job is in flight ([`memory`](crate::memory)). As with
//! `RegistrationCache::get`, nobody checks that a range is memory: what is imported here are whole
//! buffers and mappings.

use crate::problem::Problem;
use crate::vulkan::{Card, Vulkan};
use crate::waiting::{Heard, wait_for, wait_for_descriptors, wait_for_the_next};
use ash::vk;
use shootdown::{AddressRange, Timeline};
use std::ptr;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

const HOST: vk::ExternalMemoryHandleTypeFlags =
    vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A `VkDevice` with one queue. Its jobs are copies of imported memory to its
/// [target](Self::arrived), in the order in which they were submitted.
pub struct Gpu {
    pub card: Card,
    device: ash::Device,
    host: ash::ext::external_memory_host::Device,
    queue: Mutex<Queue>,
    pool: Mutex<vk::CommandPool>,
    /// Timeline semaphores: the number of the last job that is done, and what jobs wait for.
    done: vk::Semaphore,
    gate: vk::Semaphore,
    opened: Mutex<u64>,
    target: vk::Buffer,
    target_memory: vk::DeviceMemory,
    /// Where the target's memory is mapped, and its bytes.
    target_at: usize,
    target_len: u64,
    heard: Heard,
    waiter: Option<JoinHandle<()>>,
    vulkan: Arc<Vulkan>,
}

struct Queue {
    queue: vk::Queue,
    submitted: u64,
    /// The highest gate that a job waits for.
    gate: u64,
    /// Where fences go, if the thread waits for their descriptors.
    fences: Option<Sender<(vk::Fence, u64)>>,
}

impl Gpu {
    /// Opens a device whose target is of `bytes`. With `fence_fd` the thread that hears of finished
    /// jobs waits for descriptors of fences, if the card has them.
    pub fn open(
        vulkan: &Arc<Vulkan>,
        card: &Card,
        bytes: u64,
        fence_fd: bool,
    ) -> Result<Arc<Self>, Problem> {
        let fence_fd = fence_fd && card.has_fence_fd;
        let priorities = [1.0];
        let queues = [vk::DeviceQueueCreateInfo::default()
            .queue_family_index(card.family)
            .queue_priorities(&priorities)];
        let mut extensions = vec![ash::ext::external_memory_host::NAME.as_ptr()];
        extensions.extend(fence_fd.then_some(ash::khr::external_fence_fd::NAME.as_ptr()));
        let mut timeline =
            vk::PhysicalDeviceTimelineSemaphoreFeatures::default().timeline_semaphore(true);
        let info = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&extensions)
            .push_next(&mut timeline);
        // SAFETY: the extensions and the feature are there, see `Vulkan::card`.
        let device = unsafe { vulkan.instance.create_device(card.physical, &info, None) }?;
        let host = ash::ext::external_memory_host::Device::new(&vulkan.instance, &device);
        // SAFETY: one queue of this family was asked for.
        let queue = unsafe { device.get_device_queue(card.family, 0) };
        // From here on dropping it destroys what there is: a null handle is none.
        let mut this = Self {
            card: card.clone(),
            queue: Mutex::new(Queue { queue, submitted: 0, gate: 0, fences: None }),
            device,
            host,
            pool: Mutex::default(),
            done: vk::Semaphore::null(),
            gate: vk::Semaphore::null(),
            opened: Mutex::default(),
            target: vk::Buffer::null(),
            target_memory: vk::DeviceMemory::null(),
            target_at: 0,
            target_len: bytes,
            heard: Heard::default(),
            waiter: None,
            vulkan: vulkan.clone(),
        };
        let pool = vk::CommandPoolCreateInfo::default().queue_family_index(card.family);
        // SAFETY: the device is alive.
        *lock(&this.pool) = unsafe { this.device.create_command_pool(&pool, None) }?;
        this.done = this.timeline()?;
        this.gate = this.timeline()?;
        this.make_target()?;
        this.start(fence_fd)?;
        Ok(Arc::new(this))
    }

    fn timeline(&self) -> Result<vk::Semaphore, Problem> {
        let mut kind =
            vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        // SAFETY: the device is alive and has the feature.
        Ok(unsafe {
            self.device
                .create_semaphore(&vk::SemaphoreCreateInfo::default().push_next(&mut kind), None)
        }?)
    }

    fn make_target(&mut self) -> Result<(), Problem> {
        use vk::MemoryPropertyFlags as Flags;
        let info = vk::BufferCreateInfo::default()
            .size(self.target_len)
            .usage(vk::BufferUsageFlags::TRANSFER_DST);
        // SAFETY: the device is alive; what is made is destroyed with it. The memory is mapped
        // once, whole, and is of a type that can be.
        unsafe {
            self.target = self.device.create_buffer(&info, None)?;
            let needs = self.device.get_buffer_memory_requirements(self.target);
            let seen = Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
            let kind =
                self.memory_type(needs.memory_type_bits, &[seen | Flags::HOST_CACHED, seen])?;
            let info = vk::MemoryAllocateInfo::default()
                .allocation_size(needs.size)
                .memory_type_index(kind);
            self.target_memory = self.device.allocate_memory(&info, None)?;
            self.device.bind_buffer_memory(self.target, self.target_memory, 0)?;
            let at = self.device.map_memory(
                self.target_memory,
                0,
                vk::WHOLE_SIZE,
                vk::MemoryMapFlags::empty(),
            )?;
            self.target_at = at.expose_provenance();
        }
        Ok(())
    }

    /// A memory type of `bits`, by the first of `wishes` that one fulfils.
    fn memory_type(&self, bits: u32, wishes: &[vk::MemoryPropertyFlags]) -> Result<u32, Problem> {
        // SAFETY: the instance is alive.
        let memory = unsafe {
            self.vulkan.instance.get_physical_device_memory_properties(self.card.physical)
        };
        let of = |wish: &vk::MemoryPropertyFlags| {
            (0..)
                .zip(memory.memory_types_as_slice())
                .find(|(index, kind)| bits >> index & 1 == 1 && kind.property_flags.contains(*wish))
        };
        let found = wishes.iter().find_map(of).map(|(index, _)| index);
        found.ok_or_else(|| {
            Problem::other(format!("{} has no memory type for this", self.card.name))
        })
    }

    /// Starts the thread that hears of finished jobs.
    fn start(&mut self, fence_fd: bool) -> Result<(), Problem> {
        let (device, heard, done) = (self.device.clone(), self.heard.clone(), self.done);
        let thread = std::thread::Builder::new().name("vulkan".into());
        self.waiter = Some(if fence_fd {
            let (sender, fences) = channel();
            lock(&self.queue).fences = Some(sender);
            let extension =
                ash::khr::external_fence_fd::Device::new(&self.vulkan.instance, &self.device);
            thread
                .spawn(move || wait_for_descriptors(&device, &extension, done, &fences, &heard))?
        } else {
            thread.spawn(move || wait_for_the_next(&device, done, &heard))?
        });
        Ok(())
    }

    /// What the numbers of [jobs](Self::upload) are reached on.
    pub fn done(&self) -> &Timeline {
        &self.heard.done
    }

    /// Imports memory. Each of its uploads copies all of it `copies` times.
    pub fn import(self: &Arc<Self>, range: AddressRange, copies: u32) -> Result<Import, Problem> {
        let len = range.len().filter(|len| *len <= self.target_len);
        let fits = |len: &u64| {
            range.start().is_multiple_of(self.card.alignment)
                && len.is_multiple_of(self.card.alignment)
        };
        let len = len
            .filter(fits)
            .ok_or_else(|| Problem::other(format!("{range:?} cannot be imported")))?;
        let mut import = Import {
            gpu: self.clone(),
            memory: vk::DeviceMemory::null(),
            buffer: vk::Buffer::null(),
            commands: None,
            last: Mutex::default(),
        };
        let at = ptr::with_exposed_provenance_mut(range.start() as usize);
        let device = &self.device;
        let mut external = vk::ExternalMemoryBufferCreateInfo::default().handle_types(HOST);
        let buffer = vk::BufferCreateInfo::default()
            .size(len)
            .usage(vk::BufferUsageFlags::TRANSFER_SRC)
            .push_next(&mut external);
        let mut pointer = vk::MemoryHostPointerPropertiesEXT::default();
        // SAFETY: the device is alive, the structures live until the calls return, and what is made
        // is destroyed with the import.
        unsafe {
            let ask = self.host.fp().get_memory_host_pointer_properties_ext;
            ask(device.handle(), HOST, at, &mut pointer).result()?;
            import.buffer = device.create_buffer(&buffer, None)?;
            let needs = device.get_buffer_memory_requirements(import.buffer);
            if needs.size > len {
                return Err(Problem::other(format!(
                    "a buffer of {len} bytes needs {} on {}",
                    needs.size, self.card.name
                )));
            }
            // Types for this may have no flags at all.
            let coherent =
                vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let bits = pointer.memory_type_bits & needs.memory_type_bits;
            let kind = self.memory_type(bits, &[coherent, vk::MemoryPropertyFlags::empty()])?;
            let mut memory =
                vk::ImportMemoryHostPointerInfoEXT::default().handle_type(HOST).host_pointer(at);
            let info = vk::MemoryAllocateInfo::default()
                .allocation_size(len)
                .memory_type_index(kind)
                .push_next(&mut memory);
            import.memory = device.allocate_memory(&info, None)?;
            device.bind_buffer_memory(import.buffer, import.memory, 0)?;
            let pool = lock(&self.pool);
            let info = vk::CommandBufferAllocateInfo::default()
                .command_pool(*pool)
                .command_buffer_count(1);
            import.commands = device.allocate_command_buffers(&info)?.first().copied();
            if let Some(commands) = import.commands {
                self.record(commands, import.buffer, len, copies)?;
            }
        }
        Ok(import)
    }

    /// # Safety
    /// The pool is locked, `commands` is of it and new, `from` is of `len` bytes.
    unsafe fn record(
        &self,
        commands: vk::CommandBuffer,
        from: vk::Buffer,
        len: u64,
        copies: u32,
    ) -> Result<(), vk::Result> {
        use vk::{AccessFlags as Access, DependencyFlags, PipelineStageFlags as Stages};
        let (device, region) = (&self.device, [vk::BufferCopy::default().size(len)]);
        let before = [vk::MemoryBarrier::default()
            .src_access_mask(Access::TRANSFER_WRITE)
            .dst_access_mask(Access::TRANSFER_WRITE)];
        let after = [vk::MemoryBarrier::default()
            .src_access_mask(Access::TRANSFER_WRITE)
            .dst_access_mask(Access::HOST_READ)];
        let begin = vk::CommandBufferBeginInfo::default()
            .flags(vk::CommandBufferUsageFlags::SIMULTANEOUS_USE);
        // SAFETY: the caller's; both buffers exist, and the target is at least as long.
        unsafe {
            device.begin_command_buffer(commands, &begin)?;
            for _ in 0..copies {
                let earlier = Stages::TRANSFER | Stages::HOST;
                device.cmd_pipeline_barrier(
                    commands,
                    earlier,
                    Stages::TRANSFER,
                    DependencyFlags::empty(),
                    &before,
                    &[],
                    &[],
                );
                device.cmd_copy_buffer(commands, from, self.target, &region);
            }
            device.cmd_pipeline_barrier(
                commands,
                Stages::TRANSFER,
                Stages::HOST,
                DependencyFlags::empty(),
                &after,
                &[],
                &[],
            );
            device.end_command_buffer(commands)
        }
    }

    /// Submits a job that copies what is imported to the target, once the gate is at `gate` (0: at
    /// once). Returns the job's number.
    pub fn upload(&self, import: &Import, gate: u64) -> Result<u64, Problem> {
        assert!(ptr::eq(self, &*import.gpu), "an import is used on its own device");
        // So that the import is not dropped between the submission and the note: it is borrowed.
        let mut last = lock(&import.last);
        let number = self.submit(import.commands, gate)?;
        *last = Last { job: number, gate };
        Ok(number)
    }

    /// Submits a job that does nothing: it is done when all before it are. Returns its number.
    pub fn marker(&self) -> Result<u64, Problem> {
        self.submit(None, 0)
    }

    fn submit(&self, commands: Option<vk::CommandBuffer>, gate: u64) -> Result<u64, Problem> {
        let mut queue = lock(&self.queue);
        if self.heard.is_lost() {
            return Err(vk::Result::ERROR_DEVICE_LOST.into());
        }
        let number = queue.submitted + 1;
        let (gates, numbers, commands) = ([gate], [number], commands.as_slice());
        let waits = &[self.gate][..usize::from(gate > 0)];
        let mut values = vk::TimelineSemaphoreSubmitInfo::default()
            .wait_semaphore_values(&gates[..waits.len()])
            .signal_semaphore_values(&numbers);
        let (stages, done) = ([vk::PipelineStageFlags::TRANSFER], [self.done]);
        let job = vk::SubmitInfo::default()
            .wait_semaphores(waits)
            .wait_dst_stage_mask(&stages[..waits.len()])
            .command_buffers(commands)
            .signal_semaphores(&done)
            .push_next(&mut values);
        let fence =
            if queue.fences.is_some() { self.exportable_fence()? } else { vk::Fence::null() };
        // SAFETY: the queue is locked, what the job uses exists until it is done, and the numbers
        // rise.
        unsafe { self.device.queue_submit(queue.queue, &[job], fence) }.inspect_err(|_| {
            // SAFETY: it was not submitted, and is null or new.
            unsafe { self.device.destroy_fence(fence, None) }
        })?;
        queue.submitted = number;
        queue.gate = queue.gate.max(gate);
        if let Some(fences) = &queue.fences {
            // Received as long as this exists: see `drop`.
            let _ = fences.send((fence, number));
        }
        Ok(number)
    }

    fn exportable_fence(&self) -> Result<vk::Fence, Problem> {
        let mut export = vk::ExportFenceCreateInfo::default()
            .handle_types(vk::ExternalFenceHandleTypeFlags::SYNC_FD);
        // SAFETY: the device is alive and has the extension.
        Ok(unsafe {
            self.device.create_fence(&vk::FenceCreateInfo::default().push_next(&mut export), None)
        }?)
    }

    /// Lets go on what waits for the gate to be at `gate`.
    pub fn open_gate(&self, gate: u64) -> Result<(), Problem> {
        Ok(self.try_open_gate(gate)?)
    }

    fn try_open_gate(&self, gate: u64) -> Result<(), vk::Result> {
        let mut opened = lock(&self.opened);
        if gate > *opened {
            let info = vk::SemaphoreSignalInfo::default().semaphore(self.gate).value(gate);
            // SAFETY: the value rises, and nothing else signals it.
            unsafe { self.device.signal_semaphore(&info) }?;
            *opened = gate;
        }
        Ok(())
    }

    /// What the jobs have copied, when all that were submitted are done, which it waits for.
    ///
    /// # Panics
    /// When it is longer than the target.
    pub fn arrived(&self, into: &mut [u8]) -> Result<(), Problem> {
        assert!(into.len() as u64 <= self.target_len, "the target is of {} bytes", self.target_len);
        let queue = lock(&self.queue);
        self.heard
            .insist(|| wait_for(&self.device, self.done, queue.submitted))
            .map_err(|_| vk::Result::ERROR_DEVICE_LOST)?;
        // SAFETY: mapped for at least as many bytes; nothing is in flight and nothing can be
        // submitted, so nobody writes.
        unsafe {
            ptr::copy_nonoverlapping(
                ptr::with_exposed_provenance::<u8>(self.target_at),
                into.as_mut_ptr(),
                into.len(),
            )
        };
        Ok(())
    }

    /// Opens the gate of a job and blocks the thread until that is done, or the device lost: then
    /// nothing reaches memory any more.
    fn settle(&self, last: Last) {
        let _ = self.heard.insist(|| {
            self.try_open_gate(last.gate)?;
            wait_for(&self.device, self.done, last.job)
        });
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let last = {
            let mut queue = lock(&self.queue);
            queue.fences = None;
            Last { job: queue.submitted, gate: queue.gate }
        };
        if last.job > 0 {
            self.settle(last);
        }
        self.heard.stop();
        let end = vk::SemaphoreSignalInfo::default().semaphore(self.done).value(last.job + 1);
        // SAFETY: nobody has this but us, so nothing is submitted. The thread, which uses the
        // device, too, ends by the signal, or when its bounded wait is over, or by the end of its
        // channel, and is joined before anything goes. All imports have gone: they keep this.
        unsafe {
            if let Some(waiter) = self.waiter.take() {
                let _ = self.device.signal_semaphore(&end);
                let _ = waiter.join();
            }
            // What was submitted is done; the queue may have something to do after that.
            let _ = self.device.device_wait_idle();
            self.device.destroy_buffer(self.target, None);
            self.device.free_memory(self.target_memory, None);
            self.device.destroy_semaphore(self.done, None);
            self.device.destroy_semaphore(self.gate, None);
            self.device.destroy_command_pool(*lock(&self.pool), None);
            self.device.destroy_device(None);
        }
    }
}

/// Imported memory. Dropping it waits for its jobs and frees it.
pub struct Import {
    gpu: Arc<Gpu>,
    memory: vk::DeviceMemory,
    buffer: vk::Buffer,
    commands: Option<vk::CommandBuffer>,
    last: Mutex<Last>,
}

/// The last job that uses an import, and what it waits for.
#[derive(Clone, Copy, Default)]
struct Last {
    job: u64,
    gate: u64,
}

impl Import {
    /// The number of the last job that uses it; 0 if there was none.
    pub fn last_job(&self) -> u64 {
        lock(&self.last).job
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        let (gpu, last) = (&self.gpu, *lock(&self.last));
        // Done, but for an error on the way.
        if gpu.done().value() < last.job {
            gpu.settle(last);
        }
        // SAFETY: no job uses them any more. A null handle is none.
        unsafe {
            if let Some(commands) = self.commands {
                gpu.device.free_command_buffers(*lock(&gpu.pool), &[commands]);
            }
            gpu.device.destroy_buffer(self.buffer, None);
            gpu.device.free_memory(self.memory, None);
        }
    }
}
