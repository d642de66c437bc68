package netns_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// user is somebody who starts the command.
type user struct {
	name   string
	uid    uint32
	subIDs string // file with the user's subordinate ids; empty: has none
	path   string // where newuidmap is
}

const ordinaryUID = 23456

// users are root and two ordinary ones, of whom one may map more ids than their own. A test run that has itself entered as an ordinary user
// has not the ids to be all of them; it says so.
func users(t *testing.T) []user {
	t.Helper()
	here, err := netns.Enclosed()
	if err != nil {
		t.Fatal(err)
	}
	if here.SingleUID {
		t.Log("only as root: this test run has itself entered with one uid, so there is no other user to be; run it as root for the others")
		return []user{{name: "root"}}
	}
	if here.UserNamespace {
		t.Log("without subordinate ids: this test run has itself entered as an ordinary user, whose range cannot hold another one; run it as root")
		return []user{{name: "root"}, {name: "ordinary", uid: ordinaryUID}}
	}
	dir, err := os.MkdirTemp(filepath.Dir(here.RunDir), "") // where everybody may go, unlike below a test's own directory
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// The run directory's mount honours no set-uid programs.
	if err := unix.Mount("test", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "newuidmap")
	ids := filepath.Join(dir, "subids")
	if err := errors.Join(os.WriteFile(program, self, 0o755), os.Chmod(program, 0o4755|os.ModeSetuid),
		os.Symlink("newuidmap", filepath.Join(dir, "newgidmap")),
		os.WriteFile(ids, fmt.Appendf(nil, "somebody:100000:65536\n%d:200000:65536\n", ordinaryUID), 0o644)); err != nil {
		t.Fatal(err)
	}
	return []user{
		{name: "root"},
		{name: "ordinary", uid: ordinaryUID},
		{name: "ordinary with subordinate ids", uid: ordinaryUID, subIDs: ids, path: dir},
	}
}

// command is this test binary in a role, started by a user.
func (u user) command(t *testing.T, role string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), roleVariable+"="+role, subIDsVariable+"="+u.subIDs, "PATH="+u.path,
		"GORACE=atexit_sleep_ms=0") // the race detector makes every process sleep for a second at its end
	if u.subIDs == "" {
		cmd.Env = append(cmd.Env, subIDsVariable+"=/dev/null")
	}
	if u.uid != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.uid, Gid: u.uid}}
	}
	return cmd
}

// said is output without what go test -cover has processes say that cannot reach its directory, being another user's.
func said(output []byte) string {
	var rest strings.Builder
	for line := range strings.Lines(string(output)) {
		if !strings.Contains(line, "coverage") {
			rest.WriteString(line)
		}
	}
	return rest.String()
}

// eachUser runs a test for every user and looks whether it left traces.
func eachUser(t *testing.T, test func(t *testing.T, u user)) {
	for _, u := range users(t) {
		t.Run(u.name, func(t *testing.T) {
			before := lookForTraces(t)
			test(t, u)
			after := lookForTraces(t)
			if extra := after.since(before); len(extra) > 0 {
				t.Errorf("processes %v are left", extra)
			}
			if !maps.Equal(before.spaces, after.spaces) {
				t.Errorf("namespaces before: %v, after: %v", before.spaces, after.spaces)
			}
			if before.mounts != after.mounts {
				t.Errorf("mounts before:\n%s\nafter:\n%s", before.mounts, after.mounts)
			}
		})
	}
}

func TestEnteringKeepsArgumentsStreamsAndExitCode(t *testing.T) {
	eachUser(t, func(t *testing.T, u user) {
		cmd := u.command(t, "facts", "-flag", "a b", "")
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader("a line"), &out, &errs
		cmd.Env = append(cmd.Env, "MANTLET_TEST_FACT=an environment")
		cmd.Dir = "/usr"
		err := cmd.Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 7 {
			t.Fatalf("ended with %v, want exit code 7; %s", err, errs.String())
		}
		if got := said(errs.Bytes()); got != "a word to stderr\n" {
			t.Errorf("stderr %q", got)
		}
		var f facts
		if err := json.Unmarshal(out.Bytes(), &f); err != nil {
			t.Fatal(err)
		}
		if want := []string{"/proc/self/exe", "-flag", "a b", ""}; !slices.Equal(f.Args, want) {
			t.Errorf("arguments %q, want %q", f.Args, want)
		}
		if f.Stdin != "a line" || f.Dir != "/usr" || f.Env != "an environment" {
			t.Errorf("stdin %q, directory %q, environment %q", f.Stdin, f.Dir, f.Env)
		}
		if f.PPID != 1 || f.UID != 0 || f.Processes != 2 || !slices.Equal(f.Links, []string{"lo"}) {
			t.Errorf("not alone, or not root, inside: %+v", f)
		}
		if f.Enclosure.RunDir == "" {
			t.Error("no run directory")
		}
		mine, err := netns.Enclosed()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(mine.RunDir, "file")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the run directory is not the enclosure's own: %v", err)
		}
		if single := u.uid != 0 && u.subIDs == ""; f.Enclosure.UserNamespace != (u.uid != 0 || mine.UserNamespace) || f.Enclosure.SingleUID != (single || mine.SingleUID) {
			t.Errorf("enclosure %+v for %+v", f.Enclosure, u)
		}
	})
}

func TestEnteringUsersHaveWorkingNetworks(t *testing.T) {
	eachUser(t, func(t *testing.T, u user) {
		out, err := u.command(t, "network").CombinedOutput()
		if err != nil || said(out) != "all well\n" {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func TestOrphansAreReapedAndChildrenKeepTheirExitCodes(t *testing.T) {
	eachUser(t, func(t *testing.T, u user) {
		if out, err := u.command(t, "orphans").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func TestACommandThatIsKilledEndsWith128AndTheSignal(t *testing.T) {
	eachUser(t, func(t *testing.T, u user) {
		var exit *exec.ExitError
		if err := u.command(t, "die").Run(); !errors.As(err, &exit) || exit.ExitCode() != 128+9 {
			t.Errorf("ended with %v", err)
		}
	})
}

// conversation is a running command whose lines are read one by one.
type conversation struct {
	*exec.Cmd
	lines *bufio.Reader
	stdin io.WriteCloser
}

func (u user) start(t *testing.T, role string) conversation {
	t.Helper()
	cmd := u.command(t, role)
	cmd.Stderr = t.Output()
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true // as a shell makes a job
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	return conversation{cmd, bufio.NewReader(stdout), stdin}
}

func (c conversation) expect(t *testing.T, want string) string {
	t.Helper()
	line, err := c.lines.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, want) {
		t.Fatalf("said %q (%v), want %q", line, err, want)
	}
	return strings.TrimSpace(strings.TrimPrefix(line, want))
}

// TestASignalArrivesOnce sends signals as kill does, to the outer process, and as a terminal does, to all of the group. The final SIGTERM
// comes after whatever else was sent, a second copy included.
func TestASignalArrivesOnce(t *testing.T) {
	for _, c := range []struct {
		to            string
		signal        syscall.Signal
		says, summary string
	}{
		{"outer", syscall.SIGINT, "interrupt", "interrupts 1 hangups 0"},
		{"group", syscall.SIGINT, "interrupt", "interrupts 1 hangups 0"},
		{"outer", syscall.SIGHUP, "hangup", "interrupts 0 hangups 1"},
		{"group", syscall.SIGHUP, "hangup", "interrupts 0 hangups 1"},
	} {
		t.Run(c.to+" "+c.says, func(t *testing.T) {
			eachUser(t, func(t *testing.T, u user) {
				talk := u.start(t, "signals")
				talk.expect(t, "ready")
				outer := talk.Process.Pid
				if err := syscall.Kill(map[string]int{"outer": outer, "group": -outer}[c.to], c.signal); err != nil {
					t.Fatal(err)
				}
				talk.expect(t, c.says)
				if err := syscall.Kill(outer, syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				talk.expect(t, c.summary)
				if err := talk.Wait(); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestNothingOutlivesAKill kills each link of the chain of processes, the outer one first of all: nobody is left who could clean up.
func TestNothingOutlivesAKill(t *testing.T) {
	for _, victim := range []string{"outer", "init", "inner"} {
		t.Run(victim, func(t *testing.T) {
			eachUser(t, func(t *testing.T, u user) {
				before := lookForTraces(t)
				c := u.start(t, "hang")
				c.expect(t, "ready")
				during := lookForTraces(t)
				left := during.since(before)
				// outer, init, inner, two pods
				if len(left) != 5 || len(during.spaces)-len(before.spaces) < 7 {
					t.Fatalf("while it runs: processes %v, namespaces %v", left, during.spaces)
				}
				slices.Sort(left)
				target := map[string]int{"outer": left[0], "init": left[1], "inner": left[2]}[victim]
				if target == left[0] && target != c.Process.Pid {
					t.Fatalf("the outer process is %d, not the first of %v", c.Process.Pid, left)
				}
				ends := make([]int, len(left))
				for i, pid := range left {
					fd, err := unix.PidfdOpen(pid, 0)
					if err != nil {
						t.Fatal(err)
					}
					defer unix.Close(fd)
					ends[i] = fd
				}
				if err := syscall.Kill(target, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				for _, fd := range ends {
					awaitEnd(fd) // that one does not end shows as the test's own timeout
				}
				var exit *exec.ExitError
				if err := c.Wait(); !errors.As(err, &exit) || victim != "outer" && exit.ExitCode() != 128+9 {
					t.Errorf("the outer process ended with %v", err)
				}
				awaitReaped(left)
			})
		})
	}
}

// awaitReaped waits until those processes, dead already, are out of the process table: the test's own init reaps what the outer one left.
func awaitReaped(pids []int) {
	for _, pid := range pids {
		for !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			runtime.Gosched()
		}
	}
}

func TestUserNamespacesForbidden(t *testing.T) {
	denied := errors.New("operation not permitted")
	for _, c := range []struct{ file, value, want string }{
		{"/proc/sys/user/max_user_namespaces", "0\n", "user.max_user_namespaces is 0"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n", "kernel.apparmor_restrict_unprivileged_userns is 1"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0\n", "kernel.unprivileged_userns_clone is 0"},
		{"", "", "the kernel or a container's rules forbid"},
	} {
		err := netns.Forbidden(denied, 1000, func(file string) ([]byte, error) {
			if file == c.file {
				return []byte(c.value), nil
			}
			return nil, os.ErrNotExist
		})
		if !errors.Is(err, denied) || !strings.Contains(err.Error(), c.want) || !strings.HasSuffix(err.Error(), "\nhint: run it with sudo") {
			t.Errorf("%s: %v", c.file, err)
		}
	}
	if err := netns.Forbidden(denied, 0, os.ReadFile); strings.Contains(err.Error(), "sudo") || !strings.Contains(err.Error(), "CAP_SYS_ADMIN") {
		t.Errorf("root without capabilities: %v", err)
	}
}

func TestSubordinateRanges(t *testing.T) {
	file := filepath.Join(t.TempDir(), "subuid")
	text := "root:100000:65536\n # a comment\n\n4711:1:10\n4711:x:65536\n4711:0:65536\n4711:300000:70000\n4711:500000:65536\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for uid, want := range map[int]string{0: "100000 65536 true", 4711: "300000 70000 true", 4712: "0 0 false"} {
		start, count, ok := netns.Subordinate(file, uid)
		if got := fmt.Sprint(start, count, ok); got != want {
			t.Errorf("uid %d: %s, want %s", uid, got, want)
		}
	}
}

func TestReadUIDMap(t *testing.T) {
	for text, want := range map[string][2]bool{
		"         0          0 4294967295\n": {false, false},
		"         0       1000          1\n": {true, true},
		"0 1000 1\n1 100000 65536\n":         {true, false},
		"":                                   {true, true},
		"         0          0      65536\n": {true, false},
		"         0     100000 4294867295\n": {true, false},
	} {
		if mapped, single := netns.ReadUIDMap(text); [2]bool{mapped, single} != want {
			t.Errorf("%q: mapped %t, single %t", text, mapped, single)
		}
	}
}
