# archive_command and restore_command, as client.py, which says what all of it means and is used where there is no perl. This
# starts five times as fast, and a start for each segment is most of what archiving costs that is not compression.
#
#     perl -f -T archive_client.pl SOCKET push NAME [ALLOWS]
#     perl -f -T archive_client.pl SOCKET fetch MODE NAME PATH [ALLOWS]
#
# No modules, `strict` included, whose reading is a tenth of a start: the tests look at this file with it. -T also keeps PERL5OPT and PERL5LIB out.

my ($ABSENT, $FAILED, $NOT_ALLOWED) = (10, 11, 12);
my ($LOOK_S, $STANDBY_LOOKS) = (0.05, 240);
# Of Linux on amd64 and arm64.
my ($AF_UNIX, $SOCK_STREAM, $SOCK_NONBLOCK, $PATH_MAX_BYTES) = (1, 1, 2048, 107);

# The answer's line; undef: not allowed now.
sub answer {
    my ($given, @words) = @_;
    my ($path) = $given =~ /\A(.*)\z/s;  # under -T what comes from outside must be taken over by a match
    my $known = $words[0] eq "push" ? 2 : 4;
    my $allows = $words[$known];
    @words = @words[0 .. $known - 1];
    if ($words[0] eq "fetch" && $words[3] !~ m{^/}) {
        my $directory = readlink("/proc/self/cwd");
        die "the working directory is not known\n" unless defined $directory;
        $words[3] = "$directory/$words[3]";
    }
    die "a line end or a tab in an argument\n" if grep { /[\n\t]/ } @words;
    die "the socket's path is too long\n" if length($path) > $PATH_MAX_BYTES;
    return if defined $allows && !is_allowed($allows, $words[0]);
    # It never blocks but in `select`: an archiver that stands still must not hold this up.
    socket(my $connection, $AF_UNIX, $SOCK_STREAM | $SOCK_NONBLOCK, 0) or die "$!\n";
    connect($connection, pack("S a*", $AF_UNIX, $path)) or die "$!\n";
    my $request = join("\t", @words) . "\n";
    while (length $request) {
        my $sent = syswrite($connection, $request);
        die "$!\n" unless defined $sent;
        substr($request, 0, $sent) = "";
    }
    my ($answer, $looks) = ("", 0);
    my $is_standby = $words[0] eq "fetch" && $words[1] eq "standby";
    until ($answer =~ /\n\z/) {
        vec(my $readable = "", fileno($connection), 1) = 1;
        my $found = select($readable, undef, undef, defined $allows || $is_standby ? $LOOK_S : undef);
        die "$!\n" if $found < 0;
        if ($found == 0) {
            return if defined $allows && !is_allowed($allows, $words[0]);
            die "the archiver does not answer\n" if $is_standby && ++$looks > $STANDBY_LOOKS;
            next;
        }
        my $received = sysread($connection, $answer, 65536, length $answer);
        die "$!\n" unless defined $received;
        die "the archiver ended before it answered\n" if $received == 0;
    }
    chomp $answer;
    return $answer;
}

# No file allows nothing.
sub is_allowed {
    my ($path, $verb) = @_;
    if (!open(my $file, "<", $path)) {
        die "$path: $!\n" if -e $path;
        return 0;
    } else {
        my $word = "";
        defined(read($file, $word, 16)) or die "$path: $!\n";
        return $word =~ /\A\s*\Q$verb\E\s*\z/;
    }
}

my $answer = eval { my $found = answer(@ARGV); defined $found ? $found : "refused" };
if (!defined $answer) {
    print STDERR "archive: no answer of the archiver: $@";
    exit $FAILED;
}
exit $NOT_ALLOWED if $answer eq "refused";
my ($word, $text) = split / /, $answer, 2;
print STDERR "archive: $text\n" if defined $text && length $text;
exit($word eq "done" ? 0 : $word eq "absent" ? $ABSENT : $FAILED);
