package source

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const onePod = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"

func podNamed(name string) []byte {
	return []byte(strings.ReplaceAll(onePod, "name: a", "name: "+name))
}

// read expects success, and gives the names of the pods.
func read(t *testing.T, o Options, paths ...string) string {
	t.Helper()
	m, err := ReadManifests(paths, o)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range m.Objects.Pods {
		names = append(names, p.Name)
	}
	return strings.Join(names, " ")
}

// refused expects Problems that mention each of the words.
func refused(t *testing.T, o Options, paths []string, words ...string) {
	t.Helper()
	m, err := ReadManifests(paths, o)
	var ps Problems
	if m != nil || !errors.As(err, &ps) {
		t.Fatalf("got %v, %v; want Problems", m, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error does not mention %q:\n%v", w, err)
		}
	}
	for _, p := range ps {
		if p.Hint == "" {
			t.Errorf("no hint: %v", p)
		}
	}
}

func TestStdin(t *testing.T) {
	o := Options{Stdin: strings.NewReader("\ufeff" + onePod + "---\r\n" + strings.ReplaceAll(string(podNamed("b")), "\n", "\r\n"))}
	if got := read(t, o, "-"); got != "a b" {
		t.Errorf("got pods %q", got)
	}
	refused(t, Options{Stdin: strings.NewReader("a: [")}, []string{"-"}, "stdin:1: ", "not YAML")
	refused(t, Options{Stdin: strings.NewReader("")}, []string{"-"}, "no pods in -")
	refused(t, Options{Stdin: strings.NewReader("kind: \xff")}, []string{"-"}, "stdin: not UTF-8")
	refused(t, Options{Stdin: io.MultiReader(strings.NewReader(onePod), errReader{})}, []string{"-"}, "stdin: the pipe broke")
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("the pipe broke") }

func TestSymlinks(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "base", "a.yaml"), podNamed("a"))
	write(t, filepath.Join(dir, "elsewhere", "b.yaml"), podNamed("b"))
	for link, to := range map[string]string{
		"base/again.yaml": "a.yaml",        // the same file by another name
		"base/loop":       "..",            // a loop
		"base/other":      "../elsewhere",  // a folder
		"base/..data":     "../elsewhere",  // hidden
		"base/text.txt":   "no such thing", // no manifest, so no matter
	} {
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if got := read(t, Options{}, filepath.Join(dir, "base"), filepath.Join(dir, "base", "a.yaml")); got != "a b" {
		t.Errorf("got pods %q", got)
	}
	if err := os.Symlink("nowhere.yaml", filepath.Join(dir, "base", "broken.yaml")); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{}, []string{filepath.Join(dir, "base")}, "broken.yaml: broken symbolic link")
}

func TestPipes(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo.yaml")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{}, []string{dir}, "fifo.yaml: not a regular file") // and it does not wait for a writer
	written := make(chan error)
	go func() { written <- os.WriteFile(fifo, []byte(onePod), 0) }()
	if got := read(t, Options{}, fifo); got != "a" {
		t.Errorf("got pods %q", got)
	}
	if err := <-written; err != nil {
		t.Fatal(err)
	}
}

func TestLimits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big.yaml")
	write(t, path, []byte(onePod))
	if err := os.Truncate(path, maxFileBytes+1); err != nil {
		t.Fatal(err)
	}
	refused(t, Options{}, []string{path}, "big.yaml: larger than 64 MiB")

	// One scalar, unfolded a thousand times a thousand times: few aliases, but too much text.
	bomb := fmt.Sprintf("a: &a %s\nb: &b [%s]\nc: [%s]\n", strings.Repeat("x", 1000), strings.Repeat("*a,", 1000), strings.Repeat("*b,", 1000))
	refused(t, Options{Stdin: strings.NewReader(bomb)}, []string{"-"}, "stdin:1: aliases (*name) unfold to more than 64 MiB")

	// Aliases within reason are fine.
	fine := "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: &l {app: a}, annotations: *l}\n"
	if got := read(t, Options{Stdin: strings.NewReader(fine)}, "-"); got != "a" {
		t.Errorf("got pods %q", got)
	}

	list := strings.Repeat(`{"apiVersion":"v1","kind":"List","items":[`, 6) + strings.Repeat("]}", 6)
	refused(t, Options{Stdin: strings.NewReader(list)}, []string{"-"}, "Lists within Lists")
	refused(t, Options{Stdin: strings.NewReader(strings.Repeat("[", 200_000))}, []string{"-"}, "not YAML")
}

// A range gives all its addresses but the first two, which are the network's and the node's, and the last; then it is an error.
func TestNetworkIsFull(t *testing.T) {
	r := newReader(Options{})
	pod := &corev1.Pod{}
	r.origin[pod] = &item{doc: &document{file: &file{name: "f"}, line: 1}}
	n := newNetwork([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/29"), netip.MustParsePrefix("fd00::/64")})
	taken := map[netip.Addr]metav1.Object{netip.MustParseAddr("10.0.0.4"): pod}
	var got []string
	for range 4 {
		got = append(got, r.drawEach(pod, n, families, taken)...)
	}
	want := "10.0.0.2 fd00::2 10.0.0.3 fd00::3 10.0.0.5 fd00::4 10.0.0.6 fd00::5"
	if s := strings.Join(got, " "); s != want || len(r.problems) != 0 {
		t.Errorf("got %s, %v; want %s", s, r.problems, want)
	}
	r.drawEach(pod, n, families, taken)
	if len(r.problems) != 1 || !strings.Contains(r.problems.Error(), "no address is left in 10.0.0.0/29") {
		t.Errorf("got %v", r.problems)
	}
}

func TestFolders(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "ok.yaml"), []byte(onePod))
	write(t, filepath.Join(dir, "dir.yaml", "b.yml"), podNamed("b")) // a folder that is called like a file
	if got := read(t, Options{}, dir); got != "a b" {
		t.Errorf("got pods %q", got)
	}
	f := finder{seen: map[string]bool{}}
	f.walk(filepath.Join(dir, "absent"))
	if len(f.problems) != 1 || f.problems[0].Hint == "" {
		t.Errorf("got %v", f.problems)
	}
}

func TestAtMostTwentyProblemsAreShown(t *testing.T) {
	var b bytes.Buffer
	for i := range 21 {
		fmt.Fprintf(&b, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: %d}\n", i)
	}
	_, err := ReadManifests([]string{"-"}, Options{Stdin: &b})
	lines := strings.Split(err.Error(), "\n")
	if want := "… and 1 more problems"; len(lines) != 41 || lines[40] != want {
		t.Errorf("%d lines, the last is %q; want 41 and %q", len(lines), lines[len(lines)-1], want)
	}
	var ps Problems
	if !errors.As(err, &ps) || len(ps) != 21 {
		t.Errorf("%d problems are kept, want all 21", len(ps))
	}
}

// The order of files and of documents in them changes nothing.
func TestOrderDoesNotMatter(t *testing.T) {
	for _, name := range []string{"gitops", "services", "same-name", "typed-list"} {
		ar, err := txtar.ParseFile(filepath.Join("testdata", name+".txtar"))
		if err != nil {
			t.Fatal(err)
		}
		var docs []string
		for _, f := range ar.Files {
			if strings.HasSuffix(f.Name, ".yaml") && !strings.Contains(f.Name, ".github") && strings.Contains(string(f.Data), "kind:") {
				docs = append(docs, strings.Split(string(f.Data), "\n---\n")...)
			}
		}
		rng := rand.New(rand.NewPCG(1, 2))
		want := ""
		for i := range 20 {
			got := summary(ReadManifests([]string{"-"}, Options{Stdin: strings.NewReader(strings.Join(docs, "\n---\n"))}))
			if want == "" {
				want = got
			}
			if got != want || !strings.Contains(got, "\npod ") {
				t.Fatalf("%s, shuffle %d: got\n%s\nwant\n%s", name, i, got, want)
			}
			rng.Shuffle(len(docs), func(i, j int) { docs[i], docs[j] = docs[j], docs[i] })
		}
	}
}
