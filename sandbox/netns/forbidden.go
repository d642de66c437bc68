package netns

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// obstacles are the settings by which distributions and administrators forbid user namespaces, and what each looks like when it does.
var obstacles = []struct{ file, forbids string }{
	{"/proc/sys/user/max_user_namespaces", "0"},
	{"/proc/sys/kernel/unprivileged_userns_clone", "0"},             // Debian's kernels before 11, some others
	{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"}, // Ubuntu since 23.10
}

// explain adds to an error of entering what forbids it and what to do about it.
func explain(err error) error {
	if hasCapability(unix.CAP_SYS_ADMIN) {
		return fmt.Errorf("enter the sandbox's namespaces: %w", err)
	}
	return forbidden(err, os.Geteuid(), os.ReadFile)
}

func forbidden(err error, uid int, read func(string) ([]byte, error)) error {
	if uid == 0 {
		return fmt.Errorf("enter the sandbox's namespaces: %w: this root has not the capability CAP_SYS_ADMIN "+
			"(a container without it?)\nhint: run it outside the container, or in one that has it", err)
	}
	for _, o := range obstacles {
		text, readErr := read(o.file)
		if value := strings.TrimSpace(string(text)); readErr == nil && value == o.forbids {
			return fmt.Errorf("enter the sandbox's namespaces: %w: %s is %s, so that ordinary users cannot make user namespaces\n"+
				"hint: run it with sudo", err, strings.ReplaceAll(strings.TrimPrefix(o.file, "/proc/sys/"), "/", "."), value)
		}
	}
	return fmt.Errorf("enter the sandbox's namespaces: %w: the kernel or a container's rules forbid ordinary users what it needs\n"+
		"hint: run it with sudo", err)
}
