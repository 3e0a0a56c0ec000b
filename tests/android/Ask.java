package org.fleetune.demo;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;

/** For each line, a path: its file, a tab, the type of that file. */
final class Ask {
    private Ask() {
    }

    public static void main(String[] arguments) throws IOException {
        BufferedReader lines = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String file = Assets.fileOf(line);
            System.out.println(file + "\t" + (file == null ? "" : Assets.typeOf(file) + " " + Assets.charsetOf(Assets.typeOf(file))));
        }
    }
}
