//! The loader, the instance and the cards. All `unsafe` here is calls of Vulkan with handles that
//! live as long as what they were made from.

use crate::problem::Problem;
use ash::vk;
use std::borrow::Cow;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, PoisonError};

const LAYER: &CStr = c"VK_LAYER_KHRONOS_validation";

/// An instance. Everything that is made from it keeps it.
pub struct Vulkan {
    pub(crate) instance: ash::Instance,
    messenger: Option<(ash::ext::debug_utils::Instance, vk::DebugUtilsMessengerEXT)>,
    /// The messenger has a pointer to it, so it goes last.
    messages: Arc<Messages>,
    _entry: ash::Entry,
}

/// What the validation layer has said.
#[derive(Default)]
struct Messages(Mutex<Vec<String>>);

/// A physical device that can import a program's memory.
#[derive(Clone)]
pub struct Card {
    pub(crate) physical: vk::PhysicalDevice,
    pub(crate) family: u32,
    pub name: String,
    pub driver: String,
    /// In bytes: where an import may begin, and what its length is a multiple of.
    pub alignment: u64,
    /// Most `VkDeviceMemory`s at a time.
    pub allocations: u32,
    /// A processor, and no card.
    pub is_processor: bool,
    /// A fence can be a file descriptor (`VK_KHR_external_fence_fd`, `SYNC_FD`).
    pub has_fence_fd: bool,
}

fn text(of: Result<&CStr, std::ffi::FromBytesUntilNulError>) -> String {
    of.map_or_else(|_| "?".into(), |text| text.to_string_lossy().into_owned())
}

/// # Safety
/// As Vulkan calls it: `data` is valid for the call, `user` is a [`Messages`] that outlives the
/// messenger.
unsafe extern "system" fn note(
    _severity: vk::DebugUtilsMessageSeverityFlagsEXT,
    _types: vk::DebugUtilsMessageTypeFlagsEXT,
    data: *const vk::DebugUtilsMessengerCallbackDataEXT<'_>,
    user: *mut c_void,
) -> vk::Bool32 {
    // SAFETY: as above.
    let (messages, message) = unsafe {
        let said = (*data).p_message;
        let said = if said.is_null() {
            Cow::Borrowed("nothing")
        } else {
            CStr::from_ptr(said).to_string_lossy()
        };
        (&*user.cast_const().cast::<Messages>(), said)
    };
    messages.0.lock().unwrap_or_else(PoisonError::into_inner).push(message.into_owned());
    vk::FALSE
}

impl Vulkan {
    /// Loads Vulkan and makes an instance. With `validate` the validation layer looks at every
    /// call, if it is installed.
    pub fn open(validate: bool) -> Result<Arc<Self>, Problem> {
        // SAFETY: the system's Vulkan library, whose initializers are those of any program that
        // uses Vulkan.
        let entry = unsafe { ash::Entry::load() }
            .map_err(|error| Problem::Missing(format!("there is no Vulkan loader ({error})")))?;
        // SAFETY: as for all calls below: the structures are well formed and live until the call
        // returns.
        let layers = unsafe { entry.enumerate_instance_layer_properties() }?;
        let validate =
            validate && layers.iter().any(|layer| layer.layer_name_as_c_str() == Ok(LAYER));
        let layers: &[_] = if validate { &[LAYER.as_ptr()] } else { &[] };
        let extensions: &[_] = if validate { &[ash::ext::debug_utils::NAME.as_ptr()] } else { &[] };
        let messages = Arc::new(Messages::default());
        let mut on_message = Self::on_message(&messages);
        let program = vk::ApplicationInfo::default()
            .application_name(c"shootdown")
            .api_version(vk::API_VERSION_1_2);
        let mut info = vk::InstanceCreateInfo::default()
            .application_info(&program)
            .enabled_layer_names(layers)
            .enabled_extension_names(extensions);
        if validate {
            info = info.push_next(&mut on_message);
        }
        // SAFETY: as above; the messenger's data outlives the instance.
        let instance =
            unsafe { entry.create_instance(&info, None) }.map_err(|error| match error {
                vk::Result::ERROR_INCOMPATIBLE_DRIVER => {
                    Problem::Missing("there is no Vulkan driver".into())
                }
                other => other.into(),
            })?;
        let mut this = Self { instance, messenger: None, messages, _entry: entry };
        if validate {
            let debug = ash::ext::debug_utils::Instance::new(&this._entry, &this.instance);
            // SAFETY: the extension is enabled, and the messages outlive the messenger.
            let messenger = unsafe {
                debug.create_debug_utils_messenger(&Self::on_message(&this.messages), None)
            }?;
            this.messenger = Some((debug, messenger));
        }
        Ok(Arc::new(this))
    }

    fn on_message(messages: &Arc<Messages>) -> vk::DebugUtilsMessengerCreateInfoEXT<'static> {
        use vk::{
            DebugUtilsMessageSeverityFlagsEXT as Severity, DebugUtilsMessageTypeFlagsEXT as Type,
        };
        // What is general comes from the loader: drivers for cards that are not there.
        vk::DebugUtilsMessengerCreateInfoEXT::default()
            .message_severity(Severity::ERROR | Severity::WARNING)
            .message_type(Type::VALIDATION | Type::PERFORMANCE)
            .pfn_user_callback(Some(note))
            .user_data(Arc::as_ptr(messages).cast_mut().cast())
    }

    /// What the validation layer has said so far; `None` if it does not look.
    pub fn messages(&self) -> Option<Vec<String>> {
        self.messenger
            .as_ref()
            .map(|_| self.messages.0.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The cards that can do what is needed here, real ones first.
    pub fn cards(&self) -> Result<Vec<Card>, Problem> {
        // SAFETY: the instance is alive.
        let all = match unsafe { self.instance.enumerate_physical_devices() } {
            // No driver has found a device.
            Err(vk::Result::ERROR_INITIALIZATION_FAILED) => Vec::new(),
            all => all?,
        };
        if all.is_empty() {
            return Err(Problem::Missing(
                "no Vulkan driver has found a device (Debian, on the processor: apt-get install mesa-vulkan-drivers)".into(),
            ));
        }
        let mut cards = Vec::new();
        for physical in all {
            cards.extend(self.card(physical)?);
        }
        cards.sort_by_key(|card| card.is_processor);
        if cards.is_empty() {
            return Err(Problem::Missing(
                "no Vulkan driver has VK_EXT_external_memory_host and timeline semaphores (Debian: apt-get install mesa-vulkan-drivers)"
                    .into(),
            ));
        }
        Ok(cards)
    }

    fn card(&self, physical: vk::PhysicalDevice) -> Result<Option<Card>, Problem> {
        let instance = &self.instance;
        let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut timeline = vk::PhysicalDeviceTimelineSemaphoreFeatures::default();
        // SAFETY: for all: the physical device is of this instance, and the structures live until
        // the call returns.
        let (basic, extensions) = unsafe {
            (
                instance.get_physical_device_properties(physical),
                instance.enumerate_device_extension_properties(physical)?,
            )
        };
        let has = |name: &CStr| {
            extensions.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name))
        };
        if basic.api_version < vk::API_VERSION_1_2 || !has(ash::ext::external_memory_host::NAME) {
            return Ok(None);
        }
        let mut properties =
            vk::PhysicalDeviceProperties2::default().push_next(&mut host).push_next(&mut driver);
        let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut timeline);
        let asked = vk::PhysicalDeviceExternalFenceInfo::default()
            .handle_type(vk::ExternalFenceHandleTypeFlags::SYNC_FD);
        let mut fence = vk::ExternalFenceProperties::default();
        // SAFETY: as above; all of it is part of Vulkan 1.2.
        let families = unsafe {
            instance.get_physical_device_properties2(physical, &mut properties);
            instance.get_physical_device_features2(physical, &mut features);
            instance.get_physical_device_external_fence_properties(physical, &asked, &mut fence);
            instance.get_physical_device_queue_family_properties(physical)
        };
        let can_copy =
            vk::QueueFlags::GRAPHICS | vk::QueueFlags::COMPUTE | vk::QueueFlags::TRANSFER;
        let family = families.iter().position(|family| family.queue_flags.intersects(can_copy));
        let (Some(family), vk::TRUE) = (family, timeline.timeline_semaphore) else {
            return Ok(None);
        };
        let exportable =
            fence.external_fence_features.contains(vk::ExternalFenceFeatureFlags::EXPORTABLE);
        Ok(Some(Card {
            physical,
            family: u32::try_from(family).unwrap_or(0),
            name: text(basic.device_name_as_c_str()),
            driver: format!(
                "{} {}",
                text(driver.driver_name_as_c_str()),
                text(driver.driver_info_as_c_str())
            ),
            alignment: host.min_imported_host_pointer_alignment,
            allocations: basic.limits.max_memory_allocation_count,
            is_processor: basic.device_type == vk::PhysicalDeviceType::CPU,
            has_fence_fd: exportable && has(ash::khr::external_fence_fd::NAME),
        }))
    }
}

impl Drop for Vulkan {
    fn drop(&mut self) {
        // SAFETY: whatever was made from the instance keeps it, so nothing of that is left.
        unsafe {
            if let Some((debug, messenger)) = self.messenger.take() {
                debug.destroy_debug_utils_messenger(messenger, None);
            }
            self.instance.destroy_instance(None);
        }
    }
}
